"""The ClientApp: query, train and evaluate, handed over at once."""

from flwr.clientapp import ClientApp

from pfedmoap_flwr.federation import client

__all__ = ["app"]

app = ClientApp()
app.query()(client.answering(client.query))
app.train()(client.answering(client.train))
app.evaluate()(client.answering(client.evaluate))
