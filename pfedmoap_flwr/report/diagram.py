"""The critical-difference diagram, drawn by scikit-posthocs as SVG."""

import io
from importlib.util import find_spec

from pfedmoap_flwr.report.statistics import Ranking

MISSING = (
    "The critical-difference diagram needs scikit-posthocs: pip install 'pfedmoap-flwr[report]'"
)


def can_draw() -> bool:
    """Tell whether scikit-posthocs is installed."""
    return find_spec("scikit_posthocs") is not None


def draw_differences(ranked: Ranking) -> str:
    """Return the diagram as an SVG element; "" where scikit-posthocs is not installed."""
    if not can_draw():
        return ""
    # Two seconds that no other command needs
    import scikit_posthocs
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    labels = len(ranked.ranks)
    same = scikit_posthocs.posthoc_nemenyi_friedman(ranked.blocks.reset_index(drop=True))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pfedmoap", "font.size": 9}):
        figure = Figure(figsize=(9, 1.2 + 0.12 * labels), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        scikit_posthocs.critical_difference_diagram(
            ranked.ranks,
            same,
            ax=axes,
            # A name may hold a $, which is no formula
            label_props={"parse_math": False},
            label_fmt_left="{label} ({rank:.2f})",
            label_fmt_right="({rank:.2f}) {label}",
        )
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()
    return drawn[drawn.index("<svg") :]
