"""The accuracies of a run on what nobody trained: classes, domains, clients, other data sets."""

from statistics import harmonic_mean

from pfedmoap_flwr.runs.record import Round, mean_of

MODELS, PARTS = ("personal", "global", "zeroshot"), ("base", "novel", "unseen")


def open_accuracies(first: Round, last: Round) -> dict[str, float]:
    """Return means over clients on all test images of base, of novel classes, of the unseen domain.

    With base and novel, their harmonic mean HM = 2BN / (B + N) for each model, and for the personal
    one CM = (Local + HM) / 2, where Local is the accuracy on a client's own test images (FedMGP,
    arXiv 2511.00480, appendix C.2).
    """
    found: dict[str, float] = {}
    for model in MODELS:
        measured = first if model == "zeroshot" else last
        means = {part: measured.mean(f"{model}-{part}-accuracy") for part in PARTS}
        base, novel = means["base"], means["novel"]
        found |= {f"{model}_{p}_accuracy": mean for p, mean in means.items() if mean is not None}
        if base is not None and novel is not None:
            found[f"{model}_hm"] = harmonic_mean([base, novel])
    local = last.mean("personal-accuracy")
    if "personal_hm" in found and local is not None:
        found["personal_cm"] = (local + found["personal_hm"]) / 2
    return found


def new_accuracies(last: Round) -> dict[str, float]:
    """Return how many clients never trained, and means over them; nothing where all may train.

    new_global: what the server sends. new_personal: what one training of their own makes of it.
    """
    if not last.new_clients:
        return {}
    found: dict[str, float] = {"new_clients": len(last.new_clients)}
    for model in MODELS:
        for split in ("", "validation-"):
            mean = mean_of(last.new_clients, f"{model}-{split}accuracy")
            if mean is not None:
                found[f"new_{model}_{split.replace('-', '_')}accuracy"] = mean
    return found


def other_accuracies(last: Round) -> dict[str, float]:
    """Return the common model's accuracy on other data sets, and zero-shot CLIP's."""
    return {
        f"on_{name}_{model}_accuracy": accuracy
        for name, by_model in last.on.items()
        for model, accuracy in by_model.items()
    }
