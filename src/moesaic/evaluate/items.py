"""Multiple-choice items: the log-likelihood of every option, and the measures that accuracy is too coarse to show.

All measures look at the distribution over an item's options, softmax(option log-likelihoods), and are in nats.
Shapes: O options of one item (it may differ from item to item).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

__all__ = [
    "Item",
    "agrees",
    "best_option",
    "gold_nll",
    "items_from_rows",
    "kl_to_dense",
    "margin",
    "option_logprobs",
    "summarise",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One answered question: `option_loglik` is log P(option | context) in nats, summed over the option's tokens.

    `baseline_loglik` is log P(option) without the context, where the task asked for it (for pointwise mutual
    information). `gold` is the index of the right option.
    """

    id: str
    gold: int
    option_loglik: tuple[float, ...]
    baseline_loglik: tuple[float, ...] | None = None

    def row(self) -> dict[str, Any]:
        """This item as a row of `items.parquet`."""
        return asdict(self)


def items_from_rows(rows: Sequence[dict[str, Any]]) -> tuple[Item, ...]:
    """The items that `Item.row` wrote; other columns are ignored."""
    return tuple(
        Item(
            id=row["id"],
            gold=int(row["gold"]),
            option_loglik=tuple(row["option_loglik"]),
            baseline_loglik=None if row.get("baseline_loglik") is None else tuple(row["baseline_loglik"]),
        )
        for row in rows
    )


def option_logprobs(loglik_O: Sequence[float]) -> list[float]:
    """Log-probabilities over the options: `loglik_O` (nats) shifted so that they sum to one."""
    top = max(loglik_O)
    total = top + math.log(sum(math.exp(value - top) for value in loglik_O))
    return [value - total for value in loglik_O]


def best_option(loglik_O: Sequence[float]) -> int:
    """Index of the most likely option, the lowest one of equals (as lm-eval's argmax)."""
    return max(range(len(loglik_O)), key=lambda option: loglik_O[option])


def gold_nll(loglik_O: Sequence[float], gold: int) -> float:
    """Negative log-probability of the right option among the options, nats; log O for a model that knows nothing."""
    return -option_logprobs(loglik_O)[gold]


def margin(loglik_O: Sequence[float], gold: int) -> float:
    """Log-likelihood of the right option minus that of the best wrong one, nats; positive where the answer is right."""
    return loglik_O[gold] - max(value for option, value in enumerate(loglik_O) if option != gold)


def agrees(loglik_O: Sequence[float], dense_loglik_O: Sequence[float]) -> bool:
    """Whether both models would answer the same option, right or wrong."""
    return best_option(loglik_O) == best_option(dense_loglik_O)


def kl_to_dense(loglik_O: Sequence[float], dense_loglik_O: Sequence[float]) -> float:
    """KL(dense || model) between the distributions over the options, nats, at least 0."""
    pairs = zip(option_logprobs(dense_loglik_O), option_logprobs(loglik_O), strict=True)
    return sum(math.exp(dense) * (dense - own) for dense, own in pairs)


def summarise(items: Sequence[Item], dense: Sequence[Item] | None = None) -> dict[str, float | int]:
    """Means over `items`: `acc`, `gold_nll`, `margin`, the count `items`, and `acc_pmi` where baselines are known.

    With the `dense` model's answers to the same items also `agreement` (fraction) and `kl_to_dense`.

    Raises: ValueError where there is no item, or where `dense` lacks one of them or answers another question.
    """
    if not items:
        raise ValueError("there are no items to summarise: the task gave no option log-likelihoods.")
    summary: dict[str, float | int] = {
        "acc": fmean(best_option(item.option_loglik) == item.gold for item in items),
        "gold_nll": fmean(gold_nll(item.option_loglik, item.gold) for item in items),
        "margin": fmean(margin(item.option_loglik, item.gold) for item in items),
        "items": len(items),
    }
    if all(item.baseline_loglik is not None for item in items):
        summary["acc_pmi"] = fmean(best_option(_pmi(item)) == item.gold for item in items)
    if dense is not None:
        pairs = _paired(items, dense)
        summary["agreement"] = fmean(agrees(own, reference) for own, reference in pairs)
        summary["kl_to_dense"] = fmean(kl_to_dense(own, reference) for own, reference in pairs)
    return summary


def _pmi(item: Item) -> list[float]:
    assert item.baseline_loglik is not None
    return [own - alone for own, alone in zip(item.option_loglik, item.baseline_loglik, strict=True)]


def _paired(items: Sequence[Item], dense: Sequence[Item]) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    by_id = {item.id: item for item in dense}
    for item in items:
        other = by_id.get(item.id)
        if other is None or other.gold != item.gold or len(other.option_loglik) != len(item.option_loglik):
            raise ValueError(
                f"item {item.id!r} was {'not answered' if other is None else 'another question'} when the dense model "
                "was evaluated; evaluate both models with the same task settings, documents and seed."
            )
    return [(item.option_loglik, by_id[item.id].option_loglik) for item in items]
