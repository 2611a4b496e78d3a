"""Capture: attach hooks to layers, and hand their gradient factors out while backward runs.

Forward hooks see a layer's input; a tensor hook on its output sees the output's gradient. Tensor
hooks, unlike full backward hooks, survive in-place operations behind the layer. Each call of a
layer closes over its own input, so a layer called twice is simply heard twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tda_lightning.factors import GradientFactors
from tda_lightning.layers import Factors, find_rule
from tda_lightning.recipe import Block

Receiver = Callable[[int, GradientFactors], None]


class Capture:
    """Hooks on the recorded layers of a model; a context manager that attaches and detaches them.

    Nothing is heard outside :meth:`start` and :meth:`stop`, and factors are delivered only between
    :meth:`listen` and :meth:`stop`, so that gradients which a training step takes for its own
    purposes (a gradient penalty, say) are not mistaken for the loss's.

    Args:
        model: The module that owns the blocks.
        blocks: The layers to listen to.
        receive: Called during backward with the number of a block and the factors of one call.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], receive: Receiver) -> None:
        self._model = model
        self._blocks = blocks
        self._receive = receive
        self._handles: list[RemovableHandle] = []
        self._n: int | None = None
        self._listening = False

    def __enter__(self) -> Capture:
        """Attach the hooks."""
        for number, block in enumerate(self._blocks):
            module = self._model.get_submodule(block.name)
            hook = self._forward_hook(number, block)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Remove every hook."""
        self.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self, n: int) -> None:
        """Watch the forward pass of a batch of ``n`` samples that begins now."""
        self._n = n

    def listen(self) -> None:
        """Deliver what the backward pass that begins now shows."""
        self._listening = True

    def stop(self) -> None:
        """Watch nothing until the next :meth:`start`."""
        self._n = None
        self._listening = False

    def _forward_hook(self, number: int, block: Block) -> Callable[..., None]:
        rule = find_rule(self._model.get_submodule(block.name))
        assert rule is not None

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
        ) -> None:
            if self._n is None or not torch.is_grad_enabled() or not output.requires_grad:
                return
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            _require_batch(block, x, self._n)
            output.register_hook(self._backward_hook(number, rule.factors, module, x.detach()))

        return hook

    def _backward_hook(
        self, number: int, factors: Factors, module: nn.Module, x: Tensor
    ) -> Callable[[Tensor], None]:
        version = x._version

        def hook(grad: Tensor) -> None:
            if not self._listening:
                return
            _require_unchanged(self._blocks[number], x, version)
            with torch.no_grad():
                self._receive(number, factors(module, x, grad.detach()))

        return hook


def _require_batch(block: Block, x: Tensor, n: int) -> None:
    if (x.ndim < 2 and block.layer != "Embedding") or len(x) != n:
        raise ValueError(
            f"The {block.layer} `{block.name}` saw a tensor of shape {tuple(x.shape)} in a batch "
            f"of {n} samples; expected the samples along the first axis. Reshape its input, or "
            f"leave the layer out with `layers=[...]`."
        )


def _require_unchanged(block: Block, x: Tensor, version: int) -> None:
    if x._version != version:
        raise ValueError(
            f"The input of the {block.layer} `{block.name}` was changed in place after the layer "
            "had seen it; expected it unchanged until the backward pass. Use an operation that is "
            "not in place, or leave the layer out with `layers=[...]`."
        )
