"""ParameterSelection: the blocks of a model, their parameters, and the parameters left out.

Each recorded parameter is a block: a matrix of its first axis by all others, or one column. Runs of
earlier versions hold a layer's parameters together, a weight's bias as one more column.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from tda_lightning.stores.arguments import is_selected, unmatched
from tda_lightning.stores.recipe import Block, LeftOut, Recipe

# Reasons for which users leave parameters out. They are part of the stored recipe: a resumed run
# must give the same ones.
_NOT_CHOSEN, _NOT_TRAINED = "not among `layers`", "its parameters are in no optimizer"
CHOSEN_REASONS = (_NOT_CHOSEN, _NOT_TRAINED)
COMPLEX_REASON = "its numbers are complex, and rows are real"
# Prefixes that wrappers add to the names of the wrapped modules.
_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class ParameterSelection:
    """The parameters of a model that are recorded, and those that are not.

    Attributes:
        blocks: Recorded parameters.
        parameters: The parameters of each block; none if another optimizer trains them.
        left_out: Trained parameters that are not recorded.
    """

    blocks: tuple[Block, ...]
    parameters: tuple[tuple[nn.Parameter, ...], ...]
    left_out: tuple[LeftOut, ...]

    def all_parameters(self) -> list[nn.Parameter]:
        """Return the recorded parameters."""
        return [parameter for block in self.parameters for parameter in block]


def named_parameters(
    selection: ParameterSelection, lost: Collection[str]
) -> dict[str, nn.Parameter]:
    """Return the selected parameters by name, without those of lost blocks."""
    return {
        name: parameter
        for block, parameters in zip(selection.blocks, selection.parameters, strict=True)
        for name, parameter in zip(block.parameters, parameters, strict=False)
        if block.name not in lost
    }


def clean_name(name: str) -> str:
    """Return the name of a module or parameter without the prefixes of wrappers."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def select_parameters(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    untrained: Collection[nn.Parameter] = (),
    like: Sequence[Block] | None = None,
) -> ParameterSelection:
    """Select the parameters of ``model`` to record.

    Args:
        model: Any module.
        layers: Names of the modules or parameters to record, with ``*`` for any characters; all by
            default. A name that begins with ``!`` is left out.
        untrained: Parameters that require a gradient, but that no optimizer trains.
        like: Blocks of a run, whose layout is adopted if it has the same parameters.

    Raises:
        ValueError: If an entry of ``layers`` matches no trained parameter, none is left, or one has
            no shape yet.
    """
    owners = _owners(model)
    _require_matches(layers, owners)
    chosen: dict[nn.Parameter, str] = {}
    left_out: dict[tuple[str, str], LeftOut] = {}
    for name, (parameter, module_name, module) in owners.items():
        reason = _reason_left_out(name, module_name, parameter, layers, untrained)
        if not reason:
            chosen.setdefault(parameter, name)
            continue
        entry = left_out.get((module_name, reason))
        size = parameter.numel() + (0 if entry is None else entry.size)
        kind = type(module).__name__
        left_out[module_name, reason] = LeftOut(module_name or name, kind, size, reason)
    _require_any(chosen, left_out.values())
    blocks = _adopted(like, chosen, owners) or tuple(
        _block(parameter, name, model, owners) for parameter, name in chosen.items()
    )
    parameters = tuple(tuple(owners[p][0] for p in block.parameters) for block in blocks)
    return ParameterSelection(blocks, parameters, tuple(left_out.values()))


def select_like(model: nn.Module, recipe: Recipe) -> ParameterSelection:
    """Select the parameters that a run has recorded, in its layout.

    The blocks are those of the model if it lacks some of these parameters, or has others.
    """
    names = {name for block in recipe.blocks for name in block.parameters}
    left_out = {entry.name for entry in recipe.left_out}
    owners = _owners(model)
    new = {
        name
        for name, (_, module_name, _) in owners.items()
        if name not in names and not left_out & {name, module_name}
    }
    layers = sorted((names | new) & set(owners))
    return select_parameters(model, layers, like=() if new else recipe.blocks)


_Owners = Mapping[str, tuple[nn.Parameter, str, nn.Module]]


def _owners(model: nn.Module) -> _Owners:
    """Return each trained parameter by its names, with the module that owns it.

    Parameters without a number, such as a table of no categories, have nothing to record.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"The parameter `{name}` has no shape before the first batch; expected shapes "
                "before training. Pass a batch through the lazy modules first: call the model in "
                "its `configure_model`, say."
            )
    return {
        ".".join(filter(None, (clean_name(prefix), name))): (parameter, clean_name(prefix), module)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.requires_grad and parameter.numel()
    }


def _block(parameter: nn.Parameter, name: str, model: nn.Module, owners: _Owners) -> Block:
    uses = [(m, module) for p, m, module in owners.values() if p is parameter]
    is_convolution = any(isinstance(module, _ConvNd) for _, module in uses)
    rows = _rows(tuple(parameter.shape), is_convolution)
    return Block(
        name=name,
        layer=" and ".join(dict.fromkeys(type(module).__name__ for _, module in uses)),
        modules=tuple(dict.fromkeys(module_name for module_name, _ in uses)),
        parameters=(name,),
        rows=rows,
        columns=parameter.numel() // rows if rows else 1,
    )


def _rows(shape: tuple[int, ...], is_convolution: bool) -> int:
    """Return the number of rows of a parameter's matrix: as square as its axes allow.

    A convolution's matrix has a row per output channel, as its factors have.
    """
    if len(shape) < 2:
        return math.prod(shape)
    if len(shape) == 2 or is_convolution:
        return shape[0]
    splits = range(1, len(shape))
    return min((math.prod(shape[:k]) for k in splits), key=lambda r: r + math.prod(shape) // r)


def _adopted(
    like: Sequence[Block] | None, chosen: Mapping[nn.Parameter, str], owners: _Owners
) -> tuple[Block, ...] | None:
    """Return the blocks of a run if they hold exactly the chosen parameters, else ``None``."""
    names = [name for block in like or () for name in block.parameters]
    if any(name not in owners for name in names):
        return None
    if {owners[name][0] for name in names} != set(chosen):
        return None
    for block in like or ():
        sizes = [owners[name][0].numel() for name in block.parameters]
        if sum(sizes) != block.size or (block.columns > 1 and sizes[0] % block.rows):
            return None
    return tuple(like or ())


def _reason_left_out(
    name: str,
    module_name: str,
    parameter: nn.Parameter,
    layers: Sequence[str] | None,
    untrained: Collection[nn.Parameter],
) -> str:
    """Return the reason why a parameter is not recorded, or the empty string."""
    if layers is not None and not is_selected((module_name, name), layers):
        return _NOT_CHOSEN
    if parameter in untrained:
        return _NOT_TRAINED
    return COMPLEX_REASON if parameter.is_complex() else ""


def _require_matches(layers: Sequence[str] | None, owners: _Owners) -> None:
    modules = list(dict.fromkeys(module_name for _, module_name, _ in owners.values()))
    for pattern in unmatched((*modules, *owners), layers or ()):
        raise ValueError(
            f"`layers` contains `{pattern}`, which matches no layer with trained parameters; "
            f"expected names from {modules}. Correct the name, or use `*` as a wildcard."
        )


def _require_any(chosen: Mapping[nn.Parameter, str], left_out: Collection[LeftOut]) -> None:
    if not chosen:
        reasons = "; ".join(f"`{entry.name}`: {entry.reason}" for entry in left_out)
        raise ValueError(
            "The model has nothing that can be recorded: expected at least one trained parameter; "
            f"got {reasons or 'none'}. Train some parameters, or change `layers`."
        )


def unfrozen(
    model: nn.Module, parameters: Sequence[nn.Parameter], recipe: Recipe
) -> tuple[LeftOut, ...]:
    """Describe parameters that are trained only after recording began, if the recipe does not."""
    names = {name for block in recipe.blocks for name in block.parameters}
    names |= {entry.name for entry in recipe.left_out}
    reason = "it was not trained when recording began"
    return tuple(
        LeftOut(name, type(module).__name__, parameter.numel(), reason)
        for name, (parameter, module_name, module) in _owners(model).items()
        if any(parameter is each for each in parameters) and not names & {name, module_name}
    )


def row_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's rows: float64 if all trained parameters are, else float32."""
    formats = {p.dtype for p in model.parameters() if p.requires_grad}
    is_double = formats <= {torch.float64, torch.complex128}
    return torch.float64 if is_double else torch.float32
