"""LayerSelection: the blocks of a model, the layers that feed them, and the parameters left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from tda_lightning.gradients.layers.generic import generic_rule
from tda_lightning.gradients.layers.rule import LayerRule, as_matrix, registered_rule
from tda_lightning.stores.recipe import Block, LeftOut

# Prefixes that wrappers add to the names of the wrapped modules.
_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class BlockSource:
    """A layer that feeds a block.

    Attributes:
        module: The layer.
        name: Its name in the model.
        rule: Turns its calls into factors.
        names: Names, within the layer, of the parameters in the block.
    """

    module: nn.Module
    name: str
    rule: LayerRule
    names: tuple[str, ...]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters in the block."""
        return [self.module.get_parameter(name) for name in self.names]


@dataclass(frozen=True)
class LayerSelection:
    """The parameters of a model that are recorded, and those that are not.

    Attributes:
        blocks: Recorded parameters, in the order of ``named_modules``.
        sources: The layers that feed each block: one, or several if they share a parameter.
        left_out: Trained parameters that are not recorded.
    """

    blocks: tuple[Block, ...]
    sources: tuple[tuple[BlockSource, ...], ...]
    left_out: tuple[LeftOut, ...]


def clean_name(name: str) -> str:
    """Return the name of a module or parameter without the prefixes of wrappers."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def _uses_children(module: nn.Module) -> bool:
    """Return whether a module uses its children's parameters: they are recorded as the module's."""
    return isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters that a module uses directly, by their names in it."""
    named = module.named_parameters(recurse=_uses_children(module), remove_duplicate=False)
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def find_rule(module: nn.Module) -> LayerRule:
    """Return the rule for the type of ``module``: a registered one, or the generic one."""
    names = tuple(trained_parameters(module))
    registered = None if parametrize.is_parametrized(module) else registered_rule(module, names)
    return registered or generic_rule(names)


def select_layers(
    model: nn.Module, layers: Sequence[str] | None = None, leave_out: Sequence[str] = ()
) -> LayerSelection:
    """Select the layers of ``model`` that can be recorded.

    Args:
        model: Any module.
        layers: Names of the modules to record, with ``*`` for any characters; all by default.
        leave_out: Names of modules not to record.

    Raises:
        ValueError: If an entry of ``layers`` matches no trained module, or no layer can be
            recorded.
    """
    shared = _shared_parameters(model)
    sources: dict[tuple[nn.Parameter, ...], list[BlockSource]] = {}
    left_out: list[LeftOut] = []
    names: list[str] = []
    for name, module in _trained_modules(model):
        names.append(name)
        rule = find_rule(module)
        reason = "left out" if name in leave_out else _reason_left_out(name, module, rule, layers)
        if reason:
            size = sum(parameter.numel() for parameter in trained_parameters(module).values())
            left_out.append(LeftOut(name, type(module).__name__, size, reason))
            continue
        for source in _sources(name, module, rule, shared):
            sources.setdefault(tuple(source.parameters()), []).append(source)
    _require_matches(layers, names)
    blocks = tuple(_block(block_sources) for block_sources in sources.values())
    _require_blocks(blocks, left_out)
    return LayerSelection(blocks, tuple(map(tuple, sources.values())), tuple(left_out))


def _trained_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    used_by_parent: set[nn.Module] = set()
    for name, module in model.named_modules():
        if _uses_children(module):
            used_by_parent.update(child for child in module.modules() if child is not module)
        if module not in used_by_parent and trained_parameters(module):
            yield clean_name(name), module


def _shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    owners: dict[nn.Parameter, int] = {}
    for _, module in _trained_modules(model):
        for parameter in trained_parameters(module).values():
            owners[parameter] = owners.get(parameter, 0) + 1
    return {parameter for parameter, count in owners.items() if count > 1}


def _sources(
    name: str, module: nn.Module, rule: LayerRule, shared: set[nn.Parameter]
) -> Iterator[BlockSource]:
    """Divide a layer's parameters into blocks.

    Parameters that are shared with other layers, or listed in ``rule.apart``, get separate blocks.
    """
    trained = trained_parameters(module)
    separate = [key for key, p in trained.items() if p in shared or key in rule.apart]
    together = tuple(key for key in trained if key not in separate)
    for key, parameter in trained.items():
        if key in separate:
            # A shared weight has the same layout in all layers.
            layout = as_matrix if parameter in shared else rule.layout
            yield BlockSource(module, name, replace(rule, layout=layout), (key,))
        elif key == together[0]:
            yield BlockSource(module, name, rule, together)


def _block(block_sources: Sequence[BlockSource]) -> Block:
    first = block_sources[0]
    parameters = first.parameters()
    rows, columns = first.rule.layout([parameter.detach() for parameter in parameters]).shape
    is_whole_layer = len(first.names) == len(trained_parameters(first.module))
    return Block(
        name=first.name if is_whole_layer else ".".join(filter(None, (first.name, first.names[0]))),
        layer=" and ".join(dict.fromkeys(type(source.module).__name__ for source in block_sources)),
        modules=tuple(source.name for source in block_sources),
        parameters=tuple(".".join(filter(None, (first.name, key))) for key in first.names),
        rows=rows,
        columns=columns,
    )


def _reason_left_out(
    name: str, module: nn.Module, rule: LayerRule, layers: Sequence[str] | None
) -> str:
    """Return the reason why a module is not recorded, or the empty string."""
    # The reasons are part of the stored recipe: a resumed run must give the same ones.
    if layers is not None and not any(fnmatchcase(name, pattern) for pattern in layers):
        return "not among `layers`"
    if not name:
        return "parameters of the model itself act outside of any layer; give them a module"
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return "a list of parameters is never called; give them a module that uses them"
    return rule.obstacle(module)


def _require_matches(layers: Sequence[str] | None, names: Sequence[str]) -> None:
    for pattern in layers or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"`layers` contains `{pattern}`, which matches no layer with trained parameters; "
                f"expected names from {list(names)}. Correct the name, or use `*` as a wildcard."
            )


def _require_blocks(blocks: Sequence[Block], left_out: Sequence[LeftOut]) -> None:
    if not blocks:
        reasons = "; ".join(f"`{entry.name}`: {entry.reason}" for entry in left_out)
        raise ValueError(
            "The model has no layer that can be recorded: expected at least one layer with trained "
            f"parameters; got {reasons or 'none'}. Put the parameters into a module that is called."
        )
