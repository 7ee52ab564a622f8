"""The two Flower apps; `server_app.py` and `client_app.py` of a clone hand them to Flower."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from pfedmoap_flwr.federation import client
from pfedmoap_flwr.federation.server import serve

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    serve(grid, context)


@client_app.query()
@client_app.train()
@client_app.evaluate()
def reply(message: Message, context: Context) -> Message:
    """Answer one message."""
    return client.answer([(message, context)])[0]
