"""The two Flower apps; `server_app.py` and `client_app.py` of a clone hand them to Flower."""

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from pfedmoap_flwr.federation import client
from pfedmoap_flwr.federation.server import serve

server_app = ServerApp()
client_app = ClientApp()
client_app.query()(client.answering(client.query))
client_app.train()(client.answering(client.train))
client_app.evaluate()(client.answering(client.evaluate))


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    serve(grid, context)
