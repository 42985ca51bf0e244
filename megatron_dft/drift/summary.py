"""Tensors' drift added up into layers, module types and the model: the numbers of a report."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_dft.drift import histogram, support
from megatron_dft.drift.compare import TensorDrift
from megatron_dft.drift.group import Group
from megatron_dft.drift.names import MODULE_TYPES, layer_of, module_type

OUTSIDE = "outside"  # the layer key of embeddings, final norm and head
CURVE = [10.0 ** (-4 + 0.25 * i) for i in range(17)]  # 0.01 % to 100 % of the entries
TOP_TOKENS = 30

_SPECTRAL = {
    "sigma1": "sigma1",
    "sigma1_error": "error",
    "stable_rank": "stable_rank",
    "top_singular_share": "top_share",
    "top4_singular_share": "top4_share",
}


def _key_order(key: str) -> tuple[int, str]:
    return (int(key), "") if key.isdecimal() else (1 << 30, key)


class Summary:
    """Collects `TensorDrift`s in any order; `report()` gives plain dicts, ready for JSON."""

    def __init__(self, labels: Sequence[str]):
        self._labels = list(labels)
        self._model = self._group()
        self._layers: dict[str, Group] = {}
        self._modules: dict[str, Group] = {}
        self._cells: dict[tuple[str, str], list[list[float]]] = {}
        self._tensors: dict[str, list[dict[str, Any]]] = {}
        self._pairs: dict[str, dict[str, Any]] = {}
        self._tokens: list[dict[str, Any]] = [{} for _ in self._labels]

    def _group(self) -> Group:
        return Group(len(self._labels))

    def add(self, tensor: TensorDrift) -> None:
        number, kind = layer_of(tensor.name), module_type(tensor.name)
        layer = OUTSIDE if number is None else str(number)
        self._model.add(tensor)
        for groups, key in ((self._layers, layer), (self._modules, kind)):
            if key not in groups:
                groups[key] = self._group()
            groups[key].add(tensor)
        own = self._group()
        own.add(tensor)
        cell = self._cells.setdefault((layer, kind), [[0.0, 0.0] for _ in self._labels])
        rows = []
        for i, moments in enumerate(tensor.moments):
            cell[i][0] += moments.delta_sq
            cell[i][1] += moments.base_sq
            row: dict[str, Any] = {"layer": layer, "module": kind, "shape": list(tensor.shape)}
            row |= own.statistics(i)
            spectrum = tensor.spectra[i]
            values = asdict(spectrum) if spectrum else {}
            row |= {name: values.get(key) for name, key in _SPECTRAL.items()}
            rows.append(row)
            if (norms := tensor.row_norms[i]) is not None:
                self._tokens[i][tensor.name] = _rows(norms, tensor.base_row_norms)
        self._tensors[tensor.name] = rows
        self._pairs[tensor.name] = own.pairs()

    def report(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Nested dicts: methods → label → model / layers / modules / tensors / heatmap / tokens.

        `names`: the order of the tensors (default: the order of arrival).
        """
        order = list(names or self._tensors)
        layers = sorted(self._layers, key=_key_order)
        modules = [m for m in MODULE_TYPES if m in self._modules]
        methods = {}
        for i, label in enumerate(self._labels):
            model = self._model.moments[i]
            methods[label] = {
                "model": self._model.statistics(i),
                "layers": {k: self._layers[k].statistics(i) for k in layers},
                "modules": {k: self._modules[k].statistics(i) for k in modules},
                "tensors": {n: self._tensors[n][i] for n in order},
                "heatmap": self._heatmap(i, layers, modules),
                "curve": histogram.lorenz(*model.histogram.occupied(), CURVE),
                "tokens": self._tokens[i],
            }
        return {
            "methods": methods,
            "curve_shares": CURVE,
            "histogram_error": histogram.RELATIVE_ERROR,
            "near_zero_quantile": support.QUANTILE,
            "agreement": {
                "labels": self._labels,
                "model": self._model.pairs(),
                "layers": {k: self._layers[k].pairs() for k in layers},
                "modules": {k: self._modules[k].pairs() for k in modules},
                "tensors": {n: self._pairs[n] for n in order},
            },
        }

    def _heatmap(self, method: int, layers: list[str], modules: list[str]) -> dict[str, Any]:
        """Relative update norm of each layer (rows) and module type (columns)."""
        rows = []
        for layer in layers:
            cells = [self._cells.get((layer, m)) for m in modules]
            rows.append(
                [
                    (c[method][0] / c[method][1]) ** 0.5 if c and c[method][1] else None
                    for c in cells
                ]
            )
        return {"layers": layers, "modules": modules, "relative_norm": rows}


def _rows(norms: np.ndarray, base: np.ndarray | None) -> dict[str, Any]:
    """The most changed rows of an embedding or head, and how many rows changed at all."""
    top = np.argsort(-norms, kind="stable")[:TOP_TOKENS].tolist()
    assert base is not None
    return {
        "rows": len(norms),
        "changed_rows": int(np.count_nonzero(norms)),
        "median_norm": float(np.median(norms)) if len(norms) else 0.0,
        "top": [
            {
                "id": i,
                "norm": float(norms[i]),
                "relative": float(norms[i] / base[i]) if base[i] else None,
            }
            for i in top
            if norms[i] > 0
        ],
    }
