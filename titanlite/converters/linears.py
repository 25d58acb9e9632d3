"""The linear layers that a converter turns into layers of a number format: those chosen, and why others are not."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from titanlite.converters.experts import computed_in, convert_experts, experts_in, features_of
from titanlite.converters.registry import formats_with_units
from titanlite.distributed.mesh import Mesh
from titanlite.errors import ConfigError
from titanlite.quant.convertible import name_matches
from titanlite.quant.devices import architecture
from titanlite.quant.format import Format
from titanlite.quant.groups import GroupedFormat
from titanlite.quant.linear import QuantLinear, convert_linears, reasons_in
from titanlite.registry import nearest

logger = logging.getLogger()

AUTO_FILTER = "auto_filter_small_kn"
TOO_SMALL = "too small"  # why a layer does not gain


@dataclass(frozen=True)
class LinearChoice:
    """The linear layers of a model, by fully qualified name.

    Attributes:
        linears: all of them.
        kept: those that stay in high precision, with the reason.
    """

    linears: dict[str, nn.Linear]
    kept: dict[str, str]

    @property
    def chosen(self) -> dict[str, nn.Linear]:
        """The layers to convert."""
        return {name: linear for name, linear in self.linears.items() if name not in self.kept}

    def share(self) -> str:
        """Return how many are converted, for the header of a run."""
        return f"{len(self.chosen)} of {len(self.linears)} linear layers"


def choose_linears(
    model: nn.Module,
    converter: str,
    format: Format,
    filter_fqns: list[str],
    too_small: Callable[[int, int], bool] | None,
) -> LinearChoice:
    """Choose the linear layers of ``model`` that a converter to ``format`` converts.

    Args:
        converter: its name, which is that of its section.
        filter_fqns: the option of the converter's section: layers to leave out, by whole parts of their names, and
            ``auto_filter_small_kn``.
        too_small: ``(in_features, out_features)`` -> whether the layer is expected to be slower in the format; None:
            not known.

    Raises:
        ConfigError: an entry of ``filter_fqns`` matches no linear layer, or nothing is left to convert, or
            ``auto_filter_small_kn`` is asked for without ``too_small``.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if AUTO_FILTER in filter_fqns and too_small is None:
        raise ConfigError(
            f"which sizes gain in {format.name} has not been measured; name the layers to leave out",
            key=f"{converter}.filter_fqns",
            value=AUTO_FILTER,
        )
    filters = [entry for entry in filter_fqns if entry != AUTO_FILTER]
    for entry in filters:
        if not any(name_matches(entry, name) for name in linears):
            raise ConfigError(
                "matches no linear layer"
                f"{nearest(entry, {*linears, *(name.split('.')[-1] for name in linears)})}; an entry is a whole "
                "part of a dotted name, such as output or attention.wk",
                key=f"{converter}.filter_fqns",
                value=entry,
            )
    not_convertible = reasons_in(model, format)

    def why_kept(name: str, linear: nn.Linear) -> str | None:
        matching = next((entry for entry in filters if name_matches(entry, name)), None)
        if matching is not None:
            return f"filter_fqns: {matching}"
        if isinstance(linear, QuantLinear):
            raise ConfigError(
                f"{name} is converted already, by {linear.format.name}; name it in the filter_fqns of one of the two",
                key="model.converters",
                value=converter,
            )
        if name in not_convertible:
            return not_convertible[name]
        if too_small is not None and AUTO_FILTER in filter_fqns and too_small(linear.in_features, linear.out_features):
            return AUTO_FILTER
        return None

    kept = {name: reason for name, linear in linears.items() if (reason := why_kept(name, linear))}
    if len(kept) == len(linears):
        raise ConfigError(
            "there is nothing to convert\n" + "\n".join(f"    {name}: {reason}" for name, reason in kept.items()),
            key="model.converters",
            value=converter,
        )
    return LinearChoice(linears, kept)


def log_table(model: nn.Module, choice: LinearChoice, will_not_gain: Callable[[int, int], str | None]) -> None:
    """Log a table of each kind of linear layer and of experts (with * for numbers in names): its features, count, and
    format. Call it after the conversion.

    Args:
        will_not_gain: ``(in_features, out_features)`` -> why a converted layer of this size is expected to be no faster
            than in high precision; None if it should be faster, or is not known.
    """
    kinds: Counter[tuple[str, str, str]] = Counter()
    for name, linear in choice.linears.items():
        computed = f"high precision ({choice.kept.get(name)})"
        if isinstance(linear, QuantLinear):  # in this format, or in that of an earlier converter
            computed = linear.format.name
            if name in choice.chosen and (reason := will_not_gain(linear.in_features, linear.out_features)):
                computed += f" (will not gain: {reason})"
        kinds[_kind(name), f"{linear.in_features} -> {linear.out_features}", computed] += 1
    for name, experts in experts_in(model).items():
        dim, inside = features_of(experts)
        kinds[_kind(name), f"{dim} -> {inside} -> {dim}, {len(experts.w1)} times", computed_in(experts)] += 1
    rows = [("layer", "features", "count", "computed in")]
    rows += [(kind, features, str(count), computed) for (kind, features, computed), count in kinds.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ("    " + "  ".join([*(f"{row[i]:<{widths[i]}}" for i in range(3)), row[3]]) for row in rows)
    logger.info("%s", "\n".join(["linear layers", *lines]))


def _kind(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


class LinearConverter:
    """A converter of linear layers whose scales are computed from the tensors alone.

    Args:
        name: of the converter, and of its section.
        recipe: for the header.
        emulated: the format is emulated because this device has no units for it.
        gathered_by: the option that lets FSDP2 gather weights in the format, if it is set.
        moe_fqns: the experts to convert, by whole parts of their names.
    """

    def __init__(
        self,
        name: str,
        recipe: str,
        format: Format,
        filter_fqns: list[str],
        emulated: bool,
        mesh: Mesh,
        gathered_by: str | None = None,
        moe_fqns: list[str] | None = None,
    ) -> None:
        self.name, self.recipe, self.format, self.mesh = name, recipe, format, mesh
        self.filter_fqns, self.emulated, self.units = filter_fqns, emulated, target_or_device(mesh)
        self.gathered_by, self.moe_fqns = gathered_by, moe_fqns or []

    def convert(self, model: nn.Module) -> str:
        choice = choose_linears(model, self.name, self.format, self.filter_fqns, self.too_small())
        if self.gathered_by is not None:
            check_shards(choice.chosen, self.mesh, self.name, self.gathered_by)
        try:
            convert_linears(
                model,
                self.format,
                self._convert,
                lambda _, name: choice.kept.get(name),
                gather_quantized=self.gathered_by is not None,
            )
        except ValueError as e:
            raise ConfigError(str(e), key="model.converters", value=self.name) from e
        experts = ""
        if isinstance(self.format, GroupedFormat):
            experts = convert_experts(model, self.name, self.format, self.moe_fqns)
        log_table(model, choice, self.why_no_gain)
        instead = native_instead(self.units) if self.emulated else ""
        return f"{self.recipe}{', emulated' if self.emulated else ''}, {choice.share()}{experts}{instead}"

    def why_no_gain(self, in_features: int, out_features: int) -> str | None:
        """Return why a layer of this size is expected to be no faster in the units for the format; None if it should be
        faster, or is not known."""
        rule = self.too_small()
        return TOO_SMALL if rule is not None and rule(in_features, out_features) else None

    def too_small(self) -> Callable[[int, int], bool] | None:
        """Return the rule of ``auto_filter_small_kn``: ``(in_features, out_features)`` -> whether a layer is expected
        to be slower in the format on this device; None: it has not been measured."""
        return None

    def _convert(self, linear: nn.Linear) -> None:
        layer = QuantLinear.from_linear(linear, self.format, gather_quantized=self.gathered_by is not None)
        if self.gathered_by is not None:
            layer.gather_option = self.gathered_by

    def post_optimizer_hook(self, model: nn.Module) -> None:
        """Do nothing: no scale has a state."""


def check_shards(chosen: dict[str, nn.Linear], mesh: Mesh, converter: str, option: str) -> None:
    """Check that all shards have the same number of rows, since scales of rows are gathered with the rows.

    Args:
        chosen: the layers by name.
        option: the one that lets FSDP2 gather them in the format.

    Raises:
        ConfigError: they do not.
    """
    key, _, value = option.partition(" = ")
    for name, linear in chosen.items():
        if linear.out_features % mesh.fsdp.size():
            raise ConfigError(
                f"the {linear.out_features} rows of {name} over {mesh.fsdp.size()} shards: each shard must have the "
                f"same number, as scales of rows are gathered with them; add {name} to {converter}.filter_fqns, choose "
                "another degree, or leave the option out",
                key=key,
                value=value or True,
            )


def target_or_device(mesh: Mesh) -> str:
    """Return the architecture that a run computes for: that of an estimate, else that of this process's device."""
    return mesh.target.architecture or architecture(torch.device(mesh.device_type))


def native_instead(units: str) -> str:
    """Return, for the header of a run whose format is emulated on ``units``, an architecture, the formats that are not;
    an empty string if all are."""
    native = formats_with_units(units)
    there = f"{' and '.join(native)} {'has' if len(native) == 1 else 'have'} units on {units}"
    return f"; {there}, titanlite doctor measures what that gains" if native else ""


def warn_of_emulation(format: str, units: str) -> None:
    """Say that ``units``, an architecture, has none for ``format``."""
    logger.warning(
        "%s is emulated: %s has no %s units; the same quantized values are multiplied in float32", format, units, format
    )
