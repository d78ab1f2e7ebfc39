"""M3: multi-scale momentum whose sum is orthogonalised by Newton-Schulz, and AdamW for what is no matrix.

M3 keeps k momenta, each of its own time scale, sums them element by element and orthogonalises the sum: with one
time scale it is Muon. Parameters may be whole, or sharded as FSDP2 and HSDP shard them; the update is the same
(`planner.py`). State is made with the optimizer, fp32 and placed like the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import momentum
from .adamw import adamw_step
from .firing import Firing, Moved, count_step
from .newton_schulz import shape_factor
from .orthogonaliser import Orthogonaliser, agree, group_of, orthogonalisers
from .pipeline import Turns, take_turns
from .planner import Schedule
from .schema import M3Config
from .state import check_gradients, check_group, check_state, local, make_state, take_over, time_scales

Place = tuple[int, int]
"""(group, number in the group) of a parameter."""


class M3(torch.optim.Optimizer):
    """M3 and AdamW behind one `step`.

    Groups need the keys `params` and `algorithm` ("m3" or "adamw") and may have `lr`, `lr_scale` (factor on the
    configuration's lr, for a group without its own), `weight_decay`, `betas` (of adamw), `period`, and `name` and
    `param_names`, which errors say; without, they count groups and parameters from 0. A matrix is (parameter, leading
    index): leading dims of an m3 parameter are a batch of matrices, those of a convolution's kernel too, which is
    better given to adamw. Decay is decoupled: w <- w (1 - lr decay) first.

    It takes steps, and that is all: clip gradients before `step`, and set `lr` of the groups by any scheduler. Of an
    `OptimizerConfig` it reads what `M3Config` has; `clip`, `schedule`, `groups` and `routes` are for whoever makes the
    groups and calls `step`, the trainer for example.

    A group of `period` C (default 1) fires on every C-th step: it then moves once, on the sum of the C gradients and at
    the rate of that step. In between they wait in the state `period_sum`. Decay, Adam's corrections and the pulse of
    M3's levels count firings. `group["num_steps"]` counts steps, of which num_steps // C fired; a step that is not
    taken (non-finite gradients) moves nothing and counts nowhere.

    A parameter without gradient takes no part in a step: it does not move, and neither does its state. In a slow group
    it counts as a gradient of zero. Its matrices keep their place in the exchanges of the others either way, so ranks
    need not agree on who has gradients. A gradient is a DTensor like its parameter; one that is placed otherwise, a sum
    still to be made for example, is redistributed, which all ranks that hold it must do together.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        config: M3Config,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Check the groups and make their state.

        Args:
            groups: of parameters.
            config: settings; `lr`, `weight_decay` and `adam`'s betas are for groups that have none of their own.
            process_group: ranks that hold the parameters together. None takes the ranks of the mesh of each DTensor;
                plain parameters that ranks hold copies of are orthogonalised once only with a group.

        Raises:
            TypeError: the configuration is no `M3Config`.
            ValueError: a group without parameters, in no order, of an unknown algorithm or option, or with a period,
                rate, decay or betas out of range; a parameter twice, not of fp64, fp32, bf16 or fp16, or in an m3 group
                with fewer than 2 dims or none of its numbers; a placement that M3 does not know; a plan that cannot be
                used.
        """
        if not isinstance(config, M3Config):
            kind = type(config).__name__
            raise TypeError(f"M3 got a {kind} for its config, which must be an M3Config; write M3Config(lr=...)")
        self.config = config
        self.process_group = process_group
        self._teams: list[tuple[Orthogonaliser, list[Place]]] | None = None
        self._agreed = False
        self._complete = False
        defaults = {"lr": config.lr, "weight_decay": config.weight_decay, "period": 1, "num_steps": 0}
        super().__init__(list(groups), defaults)
        self._complete = True
        self.moved: list[Moved | None] = [None] * len(self.param_groups)
        """How far each group moved on the last step, where that was measured."""
        self.skipped = False
        """Whether the last step was not taken, for gradients that are not finite."""
        self._by_team()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its state; raises as the constructor does, and adds nothing then."""
        check_group(param_group, self.param_groups)
        if "lr_scale" in param_group:
            param_group.setdefault("lr", self.config.lr * param_group["lr_scale"])
        if param_group["algorithm"] == "m3":
            param_group["time_scales"] = time_scales(self.config)
        else:
            param_group.setdefault("betas", (self.config.adam.beta1, self.config.adam.beta2))
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        for parameter in added["params"]:
            self.state[parameter] = make_state(parameter, added, self.config)
        if not self._complete:
            # The constructor plans for all groups at once.
            return
        self._teams, self._agreed = None, False
        try:
            self._by_team()
        except ValueError:
            self.param_groups.pop()
            for parameter in added["params"]:
                del self.state[parameter]
            raise
        self.moved.append(None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state and options.

        Raises:
            ValueError: the state is of other groups or parameters, periods of levels, form, buffers, algorithm, period
                or shape; nothing is taken over then. Rates, decay and betas come with it; eta, theta, weights, drain
                and how matrices are orthogonalised do not, and are those of this optimizer.
        """
        check_state(state_dict, self, self.config)
        own = {parameter: self.state[parameter] for group in self.param_groups for parameter in group["params"]}
        super().load_state_dict(state_dict)
        self.state.update(take_over(state_dict, self.param_groups, own))

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle keep.

        Raises:
            TypeError: of an optimizer that was given a process group, which belongs to this process alone.
        """
        if self.process_group is not None:
            raise TypeError("an M3 that was given a process group cannot be copied; copy its state_dict instead")
        return {**super().__getstate__(), "config": self.config, "process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` kept."""
        super().__setstate__(state)
        self._teams, self._agreed, self._complete = None, False, True
        self.moved: list[Moved | None] = [None] * len(self.param_groups)
        self.skipped = False

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        finite: bool | None = None,
        report_in: int | None = None,
    ) -> float | None:
        """Take one step from the gradients in `.grad`, which are read and left as they are.

        Args:
            closure: computes the loss and its gradients first.
            finite: whether all gradients of all ranks are finite, from someone who knows; None finds out, by one
                reduction of one number. If they are not, nothing moves, neither parameters nor state.
            report_in: steps from this one to the next report; a group whose last firing until then is this one leaves
                in `moved` how far it moved, at the cost of a copy of one parameter at a time. None for no report.

        Raises:
            TypeError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups)
        self.skipped = not (self._all_finite() if finite is None else finite)
        if self.skipped:
            self.moved = [None] * len(self.param_groups)
            return loss
        self._agree()
        counted = [count_step(group, index, self.state, report_in) for index, group in enumerate(self.param_groups)]
        firings = [firing for firing in counted if firing is not None]
        matrices = [firing for firing in firings if firing.group["algorithm"] == "m3"]
        others = [firing for firing in firings if firing.group["algorithm"] == "adamw"]
        directions = {firing.index: self._directions(firing) for firing in matrices}
        self._orthogonalise(matrices, directions, meanwhile=lambda: [self._adamw(firing) for firing in others])
        for firing in matrices:
            self._move(firing, directions.pop(firing.index))
        if self.config.form == "paper":
            self._advance_slow(matrices)
        for firing in firings:
            firing.empty_sums(self.state)
        self.moved = [None if firing is None else firing.moved() for firing in counted]
        return loss

    def schedules(self) -> list[Schedule]:
        """Who orthogonalises what when all m3 groups fire, one schedule a team of ranks."""
        return [team.schedule(range(len(places)), exact=True) for team, places in self._by_team()]

    def _all_finite(self) -> bool:
        """Whether all gradients are, on every rank."""
        gradients = [local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        # Sums of absolute values are quick to make; one may overflow though each number is finite.
        sums = [norm.isfinite() for norm in torch._foreach_norm(gradients, 1)] if gradients else []
        finite = not sums or bool(torch.stack(sums).all()) or all(bool(g.isfinite().all()) for g in gradients)
        flag = torch.tensor(int(finite), device=self._device)
        for shared in self._process_groups():
            dist.all_reduce(flag, dist.ReduceOp.MIN, shared)
        return bool(flag)

    @property
    def _device(self) -> torch.device:
        return local(self.param_groups[0]["params"][0]).device

    def _process_groups(self) -> list[dist.ProcessGroup]:
        """Those that hold parameters together; all ranks too where they are several, which not every rank may be in."""
        parameters = (p for group in self.param_groups for p in group["params"])
        found = dict.fromkeys(shared for p in parameters if (shared := group_of(p, self.process_group)) is not None)
        world = [dist.group.WORLD] if len(found) > 1 and dist.group.WORLD is not None else []
        return [*found, *(shared for shared in world if shared not in found)]

    def _agree(self) -> None:
        """On the first step, check that all ranks have the same optimizer: else they would wait for each other forever.

        Raises:
            RuntimeError: they have not; on every rank.
        """
        if self._agreed:
            return
        told = [self.config.model_dump_json(), *(schedule.fingerprint for schedule in self.schedules())]
        for group in self.param_groups:
            shapes = [tuple(p.shape) for p in group["params"]]
            told.append(repr((group["algorithm"], group["period"], group.get("param_names"), shapes)))
        for shared in self._process_groups():
            agree("\n".join(told), shared, self._device)
        self._agreed = True

    def _by_team(self) -> list[tuple[Orthogonaliser, list[Place]]]:
        """The m3 parameters by the team of ranks that holds them."""
        if self._teams is None:
            places, named = [], []
            for index, group in enumerate(self.param_groups):
                if group["algorithm"] == "m3":
                    names = group.get("param_names") or [f"{index}.{n}" for n in range(len(group["params"]))]
                    places += [(index, n) for n in range(len(names))]
                    named += list(zip(names, group["params"], strict=True))
            teams = orthogonalisers(named, self.config, self.process_group)
            self._teams = [(team, [places[n] for n in numbers]) for team, numbers in teams]
        return self._teams

    def _orthogonalise(
        self,
        firings: list[Firing],
        directions: dict[int, list[Tensor]],
        meanwhile: Callable[[], Any] = lambda: None,
    ) -> None:
        """Orthogonalise directions in place.

        Args:
            firings: of m3 groups.
            directions: group -> its directions, flat, of all of its parameters in order.
            meanwhile: what else there is to do; done while the first exchange is under way.
        """
        period = self.config.plan.block_period
        exact = {f.index: period is None or f.number % period == 0 for f in firings}
        tasks: list[Turns] = []
        for team, places in self._by_team():
            for kind in (True, False):
                members = [n for n, (index, _) in enumerate(places) if exact.get(index) is kind]
                if members:
                    held = {n: directions[places[n][0]][places[n][1]] for n in members}
                    tasks += team.tasks(members, held, exact=kind)
        take_turns([*tasks[:1], _at_once(meanwhile), *tasks[1:]])

    def _states(self, firing: Firing) -> momentum.States:
        states = [self.state[p] for p in firing.parameters]
        return {name: [local(state[name]) for state in states] for name in momentum.state_names(self.config)}

    def _directions(self, firing: Firing) -> list[Tensor]:
        if not firing.gradients:
            made = []
        elif self.config.form == "paper":
            made = momentum.advance_paper(self.config.paper_form, firing.gradients, self._states(firing))
        else:
            made = momentum.advance_levels(self.config, firing.number - 1, firing.gradients, self._states(firing))
        return firing.for_all(made)

    def _advance_slow(self, firings: list[Firing]) -> None:
        """Let the slow momentum of form=paper take in its buffer where it is due; it acts from the next firing on."""
        due = [f for f in firings if momentum.slow_level_is_due(self.config.paper_form, f.number - 1)]
        directions = {
            f.index: f.for_all(momentum.advance_paper_slow(self.config.paper_form, self._states(f))) for f in due
        }
        self._orthogonalise(due, directions)
        for firing in due:
            if firing.parameters:
                slow_updates = firing.of_taking_part(directions[firing.index])
                torch._foreach_copy_(self._states(firing)["slow_update"], slow_updates)

    def _move(self, firing: Firing, directions: list[Tensor]) -> None:
        """Decay an m3 group, then step along its orthogonalised directions."""
        group, updates = firing.group, firing.of_taking_part(directions)
        if self.config.form == "paper":
            momentum.finish_paper_update(self.config.paper_form, updates, self._states(firing))
        factors = [shape_factor(p.shape[-2], p.shape[-1], self.config.adjust) for p in firing.parameters]
        for numbers in firing.parts_to_move():
            weights = [local(firing.parameters[n]) for n in numbers]
            with firing.measuring(weights):
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_mul_([updates[n] for n in numbers], [-group["lr"] * factors[n] for n in numbers])
                moves = [updates[n].to(weight.dtype) for n, weight in zip(numbers, weights, strict=True)]
                torch._foreach_add_(weights, moves)

    def _adamw(self, firing: Firing) -> None:
        """Step an adamw group."""
        group, states = firing.group, [self.state[p] for p in firing.parameters]
        beta1, beta2 = group["betas"]
        for state in states:
            state["step"] += 1
        # They live on the host, so reading them waits for no device.
        steps = torch.stack([state["step"] for state in states]).tolist() if states else []
        for numbers in firing.parts_to_move():
            weights = [local(firing.parameters[n]) for n in numbers]
            with firing.measuring(weights):
                adamw_step(
                    weights,
                    [firing.gradients[n] for n in numbers],
                    [local(states[n]["exp_avg"]) for n in numbers],
                    [local(states[n]["exp_avg_sq"]) for n in numbers],
                    [steps[n] for n in numbers],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    beta1=beta1,
                    beta2=beta2,
                    eps=self.config.adam.eps,
                )


def _at_once(do: Callable[[], Any]) -> Turns:
    do()
    return
    yield
