"""Working with the slow weights: evaluate or save on them, and interpolate outside the rhythm of k."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ContextDecorator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ._checkpoint import TRAIN, given_by_index
from ._hooked import Hooked
from ._hyperparameters import check_whole
from ._interrupts import uninterrupted
from ._norm import Clip, GlobalNorm
from ._swap import Swap
from ._torch import opaque_to_compile
from ._workers import ARGUMENT, Turn, Workers


class SlowWeights(Hooked):
    """The part of the public face that all optimizers with slow weights share."""

    # How many slow_weights() blocks are open, eval() counted as one, and what to undo at the end of the outermost.
    _depth: int = 0
    _evaluating: bool = False
    _swap: Swap | None = None
    _saving: RemovableHandle | None = None

    def slow_weights(self) -> AbstractContextManager[None]:
        """Puts the slow weights into the parameters for the length of a ``with`` block.

        Parameters keep their addresses. Where parameter and slow weights have one dtype the two trade places in place;
        elsewhere the fast weights are set aside. Leaving needs no memory, and neither way is cut in two by a Ctrl-C.
        Parameters that had no step yet have no slow weights, and stay as they are. Blocks may be nested; an exception
        restores the fast weights too. `state_dict()` inside gives the slow weights as slow weights.

        It swaps the parameters that this optimizer was given. Where those are not the model's own, the model does not
        change: within DeepSpeed's ZeRO they are flat copies, and within ZeroRedundancyOptimizer only this rank's share
        of the model, so that the ranks would evaluate on a mixture. Under FSDP2 the root stays gathered after a
        forward: call ``model.reshard()`` before the block ends, and before it begins where
        no backward followed the last forward.

        Raises:
            RuntimeError: From `step()`, `sync()` and `load_state_dict()` inside the block, on any thread.
            ValueError, TypeError: A slow weight has another shape than its parameter. Nothing has changed then.
        """
        return _Block(self)

    def eval(self) -> None:
        """Puts the slow weights into the parameters until `train()` is called, for trainers that call the two.

        It is a `slow_weights()` that stays open, blocks and modes may be nested, and twice is once. Of a wrapper, the
        base's own `eval()`, where it has one, is called first, each time.

        A `state_dict()` in between carries the training weights as `train_param`, and the model's own one the slow
        weights. Loading both, in either order, evaluates again: `train()` then brings back the training weights, and
        training goes on as if it had never been interrupted. Loading leaves the mode where a checkpoint was not saved
        in it: parameters that were not written since `eval()` get their training weights back, and others, into which
        their own were loaded, keep them.

        torch.distributed.checkpoint reads only what its template has, which is to be taken of an optimizer that has
        state and evaluates; and of a `flatten_optimizer_state_dict` never the training weights. Without them what is
        loaded is a checkpoint of inside `slow_weights()`: the run goes on from the slow weights.

        Raises:
            RuntimeError: From `step()` and `sync()` until `train()` is called.
            ValueError, TypeError: A slow weight has another shape than its parameter. Nothing has changed then.
        """
        with self._lock, uninterrupted():
            if not self._evaluating:
                self._enter()
                self._evaluating = True

    def train(self) -> None:
        """Ends what `eval()` began: the training weights are in the parameters again, or will be when the last
        `slow_weights()` block ends. Of a wrapper, the base's own `train()`, where it has one, is called last."""
        with self._lock, uninterrupted():
            if self._evaluating:
                self._evaluating = False
                self._leave()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_inside_slow_weights("copying or pickling")
        self._wait_for_hosted()
        state: dict[str, Any] = super().__getstate__()
        return state

    def _refuse_inside_slow_weights(self, call: str, unless_evaluating: bool = False) -> None:
        if self._depth == 0:
            return
        if call == "step()":
            # A GradScaler takes back what it told a step once that has returned, and else tells the next one both.
            for told in ("grad_scale", "found_inf"):
                self.__dict__.pop(told, None)
        if self._depth > self._evaluating:
            raise RuntimeError(
                f"{call} inside slow_weights(): leave the block first, the parameters hold the slow weights"
            )
        if self._evaluating and not unless_evaluating:
            raise RuntimeError(f"{call} after eval(): call train() first, the parameters hold the slow weights")

    @property
    def _state_keeper(self) -> Optimizer:
        """The optimizer whose state dict holds the slow weights."""
        return self

    def _enter(self) -> None:
        """One block more. To be called, as `_leave` is, with the lock and where no interrupt comes."""
        if self._depth == 0:
            self._wait_for_hosted()
            swap = Swap(self._table.slow_weights(self.param_groups, self.state))
            saving = self._watch_state_dicts()
            swap.enter()
            self._swap, self._saving = swap, saving
        self._depth += 1

    def _watch_state_dicts(self) -> RemovableHandle | None:
        # The first to see a state dict, before hooks that copy its tensors, and whoever asks for it. An optimizer that
        # never called torch's constructor has no hooks.
        if not hasattr(self._state_keeper, "_optimizer_state_dict_post_hooks"):
            return None
        return self._state_keeper.register_state_dict_post_hook(self._on_slow_weights, prepend=True)

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        swap = self._swap
        assert swap is not None
        swap.leave()
        self._forget_swap()

    def _forget_swap(self) -> None:
        if self._saving is not None:
            self._saving.remove()
        self._swap = self._saving = None

    def _on_training_weights(self, call: Callable[[], Any]) -> None:
        """Calls what reads or writes the training weights, which are in the parameters meanwhile."""
        if self._swap is None:
            call()
            return
        self._swap.leave()
        try:
            call()
        finally:
            self._swap.enter_again()

    def _on_slow_weights(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Inside `slow_weights()` a parameter may hold phi and `slow_param` theta: what is saved is phi, and where
        theta is needed to go on, that too."""
        if self._swap is None:
            return state_dict
        traded = self._swap.traded()
        state = {
            index: {name: traded[id(v)].detach().clone() if id(v) in traded else v for name, v in entries.items()}
            for index, entries in state_dict["state"].items()
            if isinstance(entries, dict)
        }
        if self._evaluating or self._table.policy.averages:
            train_params = self._swap.train_params()
            for index, param in given_by_index(state_dict, self.param_groups):
                if id(param) in train_params:
                    # A copy: what is traded changes in place when the mode is left.
                    state[index][TRAIN] = train_params[id(param)].detach().clone()
        return {**state_dict, "state": {**state_dict["state"], **state}}

    def _restore_mode(self, train_params: list[tuple[Tensor, Tensor]]) -> None:
        """A checkpoint was loaded: its mode takes the place of the one that was on.

        Args:
            train_params: Parameters that hold the slow weights, or will when their model is loaded, each with its
                training weights.
        """
        with self._lock, uninterrupted():
            if self._swap is not None:
                # What was written is of the checkpoint's model. Of the others the old slow weights hold theta.
                self._swap.leave(self._swap.written() | {id(param) for param, _ in train_params})
                self._forget_swap()
                self._depth, self._evaluating = 0, False
            if train_params:
                swap = Swap.entered(self._table.slow_weights_beside(self.param_groups, self.state, train_params))
                self._swap, self._saving = swap, self._watch_state_dicts()
                self._depth, self._evaluating = 1, True


class Interpolating(SlowWeights):
    """Slow weights from which the weights go on, Lookahead's: they may be interpolated at any time."""

    # Of a `process_group`. Neither state nor setting: a copy, a pickle and a checkpoint have none.
    _workers: Workers | None = None

    def _check_group(self, group: Mapping[str, Any], known: Mapping[str, Any]) -> None:
        super()._check_group(group, known)
        check_whole((ARGUMENT,), group, self.policy.prefix, known)
        if self._workers is not None:
            self._workers.check_parameters([group])

    def _turn(self, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Clip | None) -> Turn | None:
        if self._workers is None:
            return None
        norm = self._asked_norm
        return self._workers.turn(self._table, self.param_groups, self.state, grad_scale, found_inf, norm, clip)

    def _advance(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        norm: GlobalNorm | None,
        turn: Turn | None = None,
    ) -> None:
        if self._workers is None:
            super()._advance(grad_scale, found_inf, norm)
        else:
            self._workers.step(self._table, self.param_groups, self.state, grad_scale, found_inf, norm, turn)

    @opaque_to_compile
    def sync(self) -> None:
        """Interpolates now: every parameter that had a step gets phi <- phi + alpha (theta - phi), theta <- phi.

        With a process group the mean over its workers takes theta's place first, and all of them must call this. Step
        counts stay, so the next sync of the rhythm comes when it would have come.

        Raises:
            RuntimeError: Inside `slow_weights()` or after `eval()`, a named backend cannot serve, or the workers of a
                process group have other parameters or do not come.
            ValueError, TypeError: A setting or a state is not acceptable. Nothing has changed then.
        """
        with self._lock:
            self._refuse_inside_slow_weights("sync()")
            if self._workers is None:
                self._table.sync(self.param_groups, self.state)
            else:
                self._workers.sync(self._table, self.param_groups, self.state)


class _Block(ContextDecorator, AbstractContextManager[None]):
    """One block of `slow_weights()`, which a Ctrl-C leaves entered or not, and never for good.

    Not a generator's: between its `yield` and the `with` that waits for it Python looks for signals, and one that
    raises as it is left cannot be left again.
    """

    _entered = 0

    def __init__(self, optimizer: SlowWeights) -> None:
        self._optimizer = optimizer

    def __enter__(self) -> None:
        before = self._entered
        try:
            with self._optimizer._lock, uninterrupted():
                self._optimizer._enter()
                self._entered += 1
        except BaseException:
            # What came meanwhile is raised when all is entered, and no `with` would leave it.
            if self._entered > before:
                self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        with self._optimizer._lock, uninterrupted():
            if self._entered > 0:
                self._entered -= 1
                self._optimizer._leave()

    def __del__(self) -> None:
        # A Ctrl-C that came before `__exit__` held it back.
        while self._entered > 0:
            self.__exit__()
