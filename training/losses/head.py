"""A model's output head: its weights, and what the model does to logits after them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from logit_store.errors import StudentError

T = TypeVar("T")

FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model raises whose fields do not fit together, or that does more with its head than to call it."""


class OutputHead:
    """The head of a causal language model of transformers, taken out of its ``forward`` to be applied in chunks."""

    def __init__(self, model: Any) -> None:
        """Raises StudentError where the head is no plain linear layer, gives other logits than the model, or where the
        model does not run.
        """
        self.model, self.module, self.decoder = model, model.get_output_embeddings(), model.get_decoder()
        if type(self.module) is not nn.Linear:
            raise StudentError(
                f"the head of {type(model).__name__} is a {type(self.module).__name__}: students need a plain linear "
                "layer there (an adapter on the head is not supported)"
            )
        self._places = {module: _place_of(model, module) for module in (self.module, self.decoder)}
        try:
            self._check_against_own_logits()
        except FAILURES as error:
            reason = " ".join(str(error).split())
            raise StudentError(
                f"{type(model).__name__} does not run on four tokens, with its head apart ({reason}): the fields of "
                "its config do not fit together, or such students are not supported"
            ) from error

    def apply(self, work: Callable[[Tensor, Tensor, Tensor | None], T], hidden_ND: Tensor) -> T:
        """``work(hidden, weight, bias)``, run as the head's own ``forward``.

        So the head's hooks run, once: under ZeRO-3 they gather its weights before and after, and in the backward
        pass. ``work`` returns a tensor, or a tuple of them.
        """
        self.module.forward = lambda hidden_ND: work(hidden_ND, self.module.weight, self.module.bias)
        try:
            result: T = self.module(hidden_ND)
        finally:
            del self.module.forward
        return result

    def finish(self, logits_NW: Tensor) -> Tensor:
        """What the model makes of its head's logits: the same object where it does nothing to them.

        The model's own ``forward`` runs, with its decoder and its head standing still, so that soft-capping, scales
        and whatever else it does are right by construction.
        """
        ids_1N = torch.zeros(1, len(logits_NW), dtype=torch.long, device=logits_NW.device)
        given_1NW = logits_NW[None]
        hidden_1N1 = given_1NW[..., :1].detach()
        with self._standing_still(hidden_1N1, given_1NW):
            # Not through __call__: the hooks of ZeRO-3 and of mixed precision belong to the weights, not to this.
            finished_1NW = self.model.forward(input_ids=ids_1N, use_cache=False).logits
        return logits_NW if finished_1NW is given_1NW else finished_1NW[0]

    @contextmanager
    def _standing_still(self, hidden_1ND: Tensor, logits_1NW: Tensor | None) -> Iterator[None]:
        """Within the block the decoder returns ``hidden_1ND`` and the head, where they are given, ``logits_1NW``."""
        stubs = {self.decoder: _Returning(self._output_type(last_hidden_state=hidden_1ND))}
        if logits_1NW is not None:
            stubs[self.module] = _Returning(logits_1NW)
        try:
            for module, stub in stubs.items():
                parent, name = self._places[module]
                parent._modules[name] = stub
            yield
        finally:
            for module in stubs:
                parent, name = self._places[module]
                parent._modules[name] = module

    @torch.no_grad()
    def _check_against_own_logits(self) -> None:
        """Refuse a model whose logits are not its finished head's. Raises StudentError."""
        was_training = self.model.training
        self.model.eval()
        ids_1T = torch.arange(4, device=self.module.weight.device)[None]
        output = self.decoder(input_ids=ids_1T, use_cache=False)
        self._output_type = type(output)
        for scale in (1.0, 1000.0):  # a cap does nothing to a new model's small logits
            hidden_1TD = output.last_hidden_state * scale
            with self._standing_still(hidden_1TD, None):
                own_TW = self.model(input_ids=ids_1T, use_cache=False).logits[0]
            if not torch.allclose(own_TW, self.finish(self.module(hidden_1TD[0])), rtol=1e-4, atol=1e-4):
                raise StudentError(
                    f"{type(self.model).__name__} does something to its hidden states before its head: such students "
                    "are not supported"
                )
        self.model.train(was_training)


class _Returning(nn.Module):
    """Computes nothing and returns what it was made with."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, *_arguments: Any, **_options: Any) -> Any:
        return self.result


def _place_of(model: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is module:
                return parent, name
    raise StudentError(f"{type(model).__name__} does not hold its {type(module).__name__}: it cannot be trained")
