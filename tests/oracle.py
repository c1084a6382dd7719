"""What the optimizers must compute, stated twice in NumPy and independently of the package.

`Textbook` is the mathematics in fp64, written from the papers: Kingma & Ba 2015 (Adam), Reddi et al.
2018 (AMSGrad), Loshchilov & Hutter 2019 (decoupled weight decay), Liu et al. 2020 (RAdam), Chen et al.
2023 (Lion), torch's documentation of SGD, RMSprop and RAdam, Zhang et al. 2019 (Lookahead), and Kallusky et al.
2025 (outer momentum). It says what is right, to rounding.

`Exact` is the arithmetic: the written order of operations, each rounded once in the compute precision,
without fused multiply-add. It says which bits are right. It also knows what is stored in which dtype:
16-bit parameters are read to fp32 and rounded once on the way back, their moments and slow weights are
fp32. A master is a whole fp32 number here, whatever an optimizer keeps of it.

`test_oracle.py` holds the two against each other and against `torch.optim`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

RULES = ("adamw", "adam", "sgd", "rmsprop", "radam", "lion")
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The hyperparameters of one parameter group, with the defaults that torch and the paper give them."""

    rule: str = "adamw"
    lr: float = math.nan  # the rule's own default
    betas: tuple[float, float] | None = None  # None: the rule's own default
    eps: float = 1e-8
    weight_decay: float | None = None  # None: the rule's own default
    decoupled_weight_decay: bool | None = None  # None: as the rule's name says
    amsgrad: bool = False
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    square_decay: float = 0.99  # RMSprop's own alpha
    centered: bool = False
    maximize: bool = False
    k: int = 5
    alpha: float = 0.5
    pullback_momentum: str = "none"
    outer_momentum: float = 0.0
    outer_nesterov: bool = True
    master_weights: bool = False

    def __post_init__(self) -> None:
        assert self.rule in RULES, self.rule
        if math.isnan(self.lr):
            object.__setattr__(self, "lr", {"rmsprop": 1e-2, "lion": 1e-4}.get(self.rule, 1e-3))
        if self.betas is None:
            object.__setattr__(self, "betas", (0.9, 0.99 if self.rule == "lion" else 0.999))
        if self.weight_decay is None:
            object.__setattr__(self, "weight_decay", 1e-2 if self.rule == "adamw" else 0.0)
        if self.decoupled_weight_decay is None:
            object.__setattr__(self, "decoupled_weight_decay", self.rule in ("adamw", "lion"))


# ------------------------------------------------------------------------------------------------------------
# (a) the papers


class Textbook:
    """One parameter under Lookahead, in fp64, as the papers write it."""

    def __init__(self, theta: np.ndarray, settings: Settings) -> None:
        self.settings = settings
        self.theta = np.array(theta, dtype=np.float64)
        self.phi: np.ndarray | None = None
        self.t = 0
        self.m = np.zeros_like(self.theta)
        self.v = np.zeros_like(self.theta)
        self.v_max = np.zeros_like(self.theta)
        self.g_mean = np.zeros_like(self.theta)
        self.m_at_last_sync = np.zeros_like(self.theta)
        self.b = np.zeros_like(self.theta)

    def step(self, gradient: np.ndarray) -> None:
        s = self.settings
        if self.phi is None:
            self.phi = self.theta.copy()
        self.t += 1
        g = np.asarray(gradient, dtype=np.float64)
        g = -g if s.maximize else g
        with np.errstate(all="ignore"):
            rules = {"sgd": self._sgd, "rmsprop": self._rmsprop, "radam": self._radam, "lion": self._lion}
            rules.get(s.rule, self._adam)(g)
        if self.t % s.k == 0:
            self.sync()

    def _adam(self, g: np.ndarray) -> None:
        s = self.settings
        beta1, beta2 = s.betas
        if s.decoupled_weight_decay:
            self.theta = self.theta - s.lr * s.weight_decay * self.theta
        else:
            g = g + s.weight_decay * self.theta
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.v_max = np.maximum(self.v_max, self.v)
        m_hat = self.m / (1 - beta1**self.t)
        v_hat = (self.v_max if s.amsgrad else self.v) / (1 - beta2**self.t)
        self.theta = self.theta - s.lr * m_hat / (np.sqrt(v_hat) + s.eps)

    def _sgd(self, g: np.ndarray) -> None:
        s = self.settings
        g = g + s.weight_decay * self.theta
        if s.momentum != 0:
            self.m = s.momentum * self.m + (1 - s.dampening) * g if self.t > 1 else g
            g = g + s.momentum * self.m if s.nesterov else self.m
        self.theta = self.theta - s.lr * g

    def _rmsprop(self, g: np.ndarray) -> None:
        s = self.settings
        g = g + s.weight_decay * self.theta
        self.v = s.square_decay * self.v + (1 - s.square_decay) * g**2
        self.g_mean = s.square_decay * self.g_mean + (1 - s.square_decay) * g
        update = g / (np.sqrt(self.v - self.g_mean**2 if s.centered else self.v) + s.eps)
        if s.momentum > 0:
            self.m = s.momentum * self.m + update
            update = self.m
        self.theta = self.theta - s.lr * update

    def _radam(self, g: np.ndarray) -> None:
        s, t = self.settings, self.t
        beta1, beta2 = s.betas
        if s.decoupled_weight_decay:
            self.theta = self.theta - s.lr * s.weight_decay * self.theta
        else:
            g = g + s.weight_decay * self.theta
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        m_hat = self.m / (1 - beta1**t)
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        if rho > 5:
            r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            m_hat = m_hat * r * math.sqrt(1 - beta2**t) / (np.sqrt(self.v) + s.eps)
        self.theta = self.theta - s.lr * m_hat

    def _lion(self, g: np.ndarray) -> None:
        s = self.settings
        beta1, beta2 = s.betas
        c = np.sign(beta1 * self.m + (1 - beta1) * g)
        self.theta = self.theta - s.lr * (c + s.weight_decay * self.theta)
        self.m = beta2 * self.m + (1 - beta2) * g

    def sync(self) -> None:
        s = self.settings
        assert self.phi is not None
        pseudo_gradient = self.phi - self.theta
        self.b = s.outer_momentum * self.b + pseudo_gradient
        direction = s.outer_momentum * self.b + pseudo_gradient if s.outer_nesterov else self.b
        self.phi = self.phi - s.alpha * direction
        self.theta = self.phi.copy()
        if s.pullback_momentum == "pullback":
            alpha = min(s.alpha, 1.0)
            self.m = alpha * self.m + (1 - alpha) * self.m_at_last_sync
            self.m_at_last_sync = self.m.copy()
        elif s.pullback_momentum == "reset":
            self.m = np.zeros_like(self.m)


# ------------------------------------------------------------------------------------------------------------
# (b) the bits


class Exact:
    """One parameter under Lookahead, to the bit.

    `param` holds what the parameter stores; 16-bit values are held in fp32, where they are exact.
    `state` holds the arrays that the optimizer's state must hold under the same names, and no others; but for
    `master_param`, of which the state beside a bf16 parameter holds `master_low`, see `join_master`.

    Args:
        param: initial value; fp64 for dtype "float64", else fp32 (exactly representable in `dtype`).
        dtype: the parameter's dtype, one of `DTYPES`.
        settings: may be replaced between steps, as a scheduler would.
    """

    def __init__(self, param: np.ndarray, dtype: str, settings: Settings) -> None:
        assert dtype in DTYPES, dtype
        self.settings = settings
        self.dtype = dtype
        self.T = np.float64 if dtype == "float64" else np.float32
        self.param = np.array(param, dtype=self.T)
        assert same_bits(round_to(self.param, dtype), self.param), f"param is not representable in {dtype}"
        self.step_count = 0
        self.state: dict[str, np.ndarray] = {}

    @property
    def has_master(self) -> bool:
        return self.settings.master_weights and self.dtype in ("bfloat16", "float16")

    @property
    def momentum_name(self) -> str | None:
        if self.settings.rule not in ("sgd", "rmsprop"):
            return "exp_avg"
        return "momentum_buffer" if self.settings.momentum != 0 else None

    @property
    def other_moments(self) -> list[str]:
        s = self.settings
        if s.rule in ("sgd", "lion"):
            return []
        if s.rule == "rmsprop":
            return ["square_avg"] + ["grad_avg"] * s.centered
        return ["exp_avg_sq"] + ["max_exp_avg_sq"] * s.amsgrad

    def step(self, grad: np.ndarray, grad_scale: float | None = None) -> None:
        """One step. `grad` is exact in the compute precision; `grad_scale` is what it was multiplied by."""
        s, T = self.settings, self.T
        with np.errstate(all="ignore"):
            self._create_state()
            self.step_count += 1
            p = self._read()
            g = np.asarray(grad, dtype=T)
            unscale = 1.0 / grad_scale if grad_scale is not None else 1.0
            g = g * T((-1.0 if s.maximize else 1.0) * unscale)
            rules = {"sgd": self._sgd, "rmsprop": self._rmsprop, "radam": self._radam, "lion": self._lion}
            p = rules.get(s.rule, self._adam)(p, g)
            if self.step_count % s.k == 0:
                p = self._synced(p)
            self._write(p)

    def sync(self) -> None:
        """The interpolation alone, now."""
        with np.errstate(all="ignore"):
            self._write(self._synced(self._read()))

    def _create_state(self) -> None:
        p = self.state.get("master_param", self.param)
        zeros = np.zeros_like(self.param)
        names = [] if self.momentum_name is None else [self.momentum_name]
        names += self.other_moments
        if self.settings.pullback_momentum == "pullback" and self.momentum_name is not None:
            names.append("cached_momentum")
        if self.settings.outer_momentum != 0:
            names.append("outer_momentum_buffer")
        for name in names:
            self.state.setdefault(name, zeros.copy())
        self.state.setdefault("slow_param", p.copy())
        if self.has_master:
            self.state.setdefault("master_param", p.copy())

    def _read(self) -> np.ndarray:
        return (self.state["master_param"] if self.has_master else self.param).copy()

    def _write(self, p: np.ndarray) -> None:
        if self.has_master:
            self.state["master_param"] = p
        if self.has_master and self.dtype == "bfloat16":
            self.param = round_away(p)
        else:
            self.param = round_to(p, self.dtype)

    def _adam(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        s, T = self.settings, self.T
        beta1, beta2 = s.betas
        bias_correction1 = 1.0 - power(beta1, self.step_count)
        bias_correction2 = 1.0 - power(beta2, self.step_count)
        step_size = T(np.float64(s.lr) / np.float64(bias_correction1))
        inv_sqrt_bc2 = T(np.float64(1.0) / np.sqrt(np.float64(bias_correction2)))
        if s.weight_decay != 0:
            if s.decoupled_weight_decay:
                p = p * T(1.0 - s.lr * s.weight_decay)
            else:
                g = g + T(s.weight_decay) * p
        m = lerp(self.state["exp_avg"], g, 1.0 - beta1)
        v = T(beta2) * self.state["exp_avg_sq"] + T(1.0 - beta2) * (g * g)
        self.state["exp_avg"], self.state["exp_avg_sq"] = m, v
        if s.amsgrad:
            v_max = self.state["max_exp_avg_sq"]
            v = self.state["max_exp_avg_sq"] = np.where(~(v <= v_max), v, v_max)
        return p - (step_size * m) / (np.sqrt(v) * inv_sqrt_bc2 + T(s.eps))

    def _sgd(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        s, T = self.settings, self.T
        if s.weight_decay != 0:
            g = g + T(s.weight_decay) * p
        if s.momentum != 0:
            if self.step_count == 1:
                buf = g
            else:
                buf = T(s.momentum) * self.state["momentum_buffer"] + T(1.0 - s.dampening) * g
            self.state["momentum_buffer"] = buf
            g = g + T(s.momentum) * buf if s.nesterov else buf
        return p - T(s.lr) * g

    def _rmsprop(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        s, T = self.settings, self.T
        if s.weight_decay != 0:
            g = g + T(s.weight_decay) * p
        v = T(s.square_decay) * self.state["square_avg"] + T(1.0 - s.square_decay) * (g * g)
        self.state["square_avg"] = v
        if s.centered:
            mean = self.state["grad_avg"] = lerp(self.state["grad_avg"], g, 1.0 - s.square_decay)
            v = v - mean * mean
        denominator = np.sqrt(v) + T(s.eps)
        if s.momentum > 0:
            buffer = T(s.momentum) * self.state["momentum_buffer"] + g / denominator
            self.state["momentum_buffer"] = buffer
            return p - T(s.lr) * buffer
        return p - (T(s.lr) * g) / denominator

    def _radam(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        s, T, t = self.settings, self.T, self.step_count
        beta1, beta2 = s.betas
        power2 = np.float64(power(beta2, t))
        rho_inf = np.float64(2.0) / (1.0 - beta2) - 1.0
        rho = rho_inf - 2.0 * t * power2 / (1.0 - power2)
        step_size = np.float64(s.lr) / np.float64(1.0 - power(beta1, t))
        if s.weight_decay != 0:
            if s.decoupled_weight_decay:
                p = p * T(1.0 - s.lr * s.weight_decay)
            else:
                g = g + T(s.weight_decay) * p
        m = self.state["exp_avg"] = lerp(self.state["exp_avg"], g, 1.0 - beta1)
        v = T(beta2) * self.state["exp_avg_sq"] + T(1.0 - beta2) * (g * g)
        self.state["exp_avg_sq"] = v
        if not rho > 5.0:
            return p - T(step_size) * m
        r = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
        return p - (T(step_size * np.sqrt(r * (1.0 - power2))) * m) / (np.sqrt(v) + T(s.eps))

    def _lion(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        s, T = self.settings, self.T
        beta1, beta2 = s.betas
        m = self.state["exp_avg"]
        c = T(beta1) * m + T(1.0 - beta1) * g
        sign = np.where(c == 0, T(0), np.sign(c))
        self.state["exp_avg"] = T(beta2) * m + T(1.0 - beta2) * g
        return p * T(1.0 - s.lr * s.weight_decay) - T(s.lr) * sign

    def _synced(self, p: np.ndarray) -> np.ndarray:
        s, T = self.settings, self.T
        if s.outer_momentum != 0:
            phi, b = self.state["slow_param"], self.state["outer_momentum_buffer"]
            d = phi - p
            b = self.state["outer_momentum_buffer"] = T(s.outer_momentum) * b + d
            phi = phi - T(s.alpha) * (d + T(s.outer_momentum) * b if s.outer_nesterov else b)
        else:
            phi = lerp(self.state["slow_param"], p, s.alpha)
        self.state["slow_param"] = phi
        name = self.momentum_name
        if name is not None and s.pullback_momentum == "pullback":
            m = lerp(self.state["cached_momentum"], self.state[name], min(s.alpha, 1.0))
            self.state[name], self.state["cached_momentum"] = m, m.copy()
        elif name is not None and s.pullback_momentum == "reset":
            self.state[name] = np.zeros_like(p)
        return phi.copy()


def lerp(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    """From `a` to `b`, in their precision, exact at weight 0 and at weight 1."""
    T = a.dtype.type
    d = b - a
    return a + T(weight) * d if weight < 0.5 else b - T(1.0 - weight) * d


def power(base: float, exponent: int) -> float:
    """base ** exponent in fp64 by repeated multiplication: no library's `pow` decides the last bit."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


# ------------------------------------------------------------------------------------------------------------
# numbers


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` rounded to nearest even in `dtype`; 16-bit results are returned in fp32, where they are exact."""
    if dtype == "bfloat16":
        return round_bfloat16(x)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    return x.astype(dtype)


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    """fp32 to bf16 and back, round to nearest even, on the bit patterns."""
    x = np.ascontiguousarray(x, dtype=np.float32).reshape(np.shape(x))
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(np.float32))


def round_away(x: np.ndarray) -> np.ndarray:
    """fp32 to bf16 and back, round to nearest, ties away from zero."""
    x = np.ascontiguousarray(x, dtype=np.float32).reshape(np.shape(x))
    magnitude = x.view(np.uint32) & np.uint32(0x7FFFFFFF)
    rounded = (magnitude + np.uint32(0x8000)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, np.copysign(rounded.view(np.float32), x))


def join_master(param: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The fp32 number of which a bf16 number, held in fp32, is the rounding, and a signed 16-bit number the rest: so
    many fp32 numbers lie between the two."""
    assert low.dtype == np.int16
    bits = np.ascontiguousarray(param, dtype=np.float32).view(np.uint32).astype(np.int64) + low
    return (bits % 2**32).astype(np.uint32).view(np.float32).reshape(param.shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the bit, the sign of zero included; one NaN is as good as another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[a.dtype.itemsize]
    equal = np.ascontiguousarray(a).view(integer) == np.ascontiguousarray(b).view(integer)
    return bool(np.all(equal | (np.isnan(a) & np.isnan(b)).reshape(equal.shape)))


def ulps(a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None = None) -> float:
    """The largest distance of a and b, in units in the last place of the largest of a, b and `magnitude`."""
    if a.size == 0 or same_bits(a, b):
        return 0.0
    largest = np.maximum(np.abs(a), np.abs(b))
    if magnitude is not None:
        largest = np.maximum(largest, np.abs(magnitude))
    both_nan = np.isnan(a) & np.isnan(b)
    with np.errstate(all="ignore"):
        distance = np.abs(a.astype(np.float64) - b) / np.spacing(largest).astype(np.float64)
    distance = np.where(both_nan | (a == b), 0.0, distance)
    worst = float(np.max(distance))
    return math.inf if math.isnan(worst) else worst
