"""The ServerApp: config -> strategy -> start -> results, handed over at once."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from pfedmoap_flwr.federation.server import serve

__all__ = ["app"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    serve(grid, context)
