from typing import Any

from bnfast.layout import Plan
from bnfast.spec import Channels, Floats

STORAGE_DTYPES: tuple[str, ...]
OPENMP: bool
CYTHON_VERSION: str

def unavailable() -> str | None: ...
def instruction_set() -> str: ...
def before_fork() -> None: ...
def limit_instruction_set(name: str) -> None: ...
def assume_caches(core: int, last: int) -> None: ...
def accepts(x: object) -> bool: ...
def view(x: Any, plan: Plan) -> Floats: ...
def empty(plan: Plan, like: Any) -> Any: ...
def moments(x: Floats, *, mean: Channels, m2: Channels, num_threads: int) -> None: ...
def normalize(
    x: Floats,
    mean: Channels,
    var: Channels,
    weight: Channels,
    bias: Channels,
    eps: float,
    residual: Floats | None,
    *,
    y: Floats,
    relu: bool,
    num_threads: int,
) -> None: ...
def train(
    x: Floats,
    weight: Channels,
    bias: Channels,
    eps: float,
    residual: Floats | None,
    *,
    y: Floats,
    mean: Channels,
    m2: Channels,
    relu: bool,
    num_threads: int,
) -> None: ...
def backward_sums(
    dy: Floats,
    x: Floats,
    y: Floats | None,
    mean: Channels,
    invstd: Channels,
    *,
    sum_dy: Channels,
    sum_dy_xhat: Channels,
    relu: bool,
    num_threads: int,
) -> None: ...
def backward_input(
    dy: Floats,
    x: Floats,
    y: Floats | None,
    mean: Channels,
    invstd: Channels,
    weight: Channels,
    sum_dy: Channels,
    sum_dy_xhat: Channels,
    count: int,
    *,
    dx: Floats,
    dresidual: Floats | None,
    relu: bool,
    num_threads: int,
) -> None: ...
def backward(
    dy: Floats,
    x: Floats,
    y: Floats | None,
    mean: Channels,
    invstd: Channels,
    weight: Channels,
    *,
    dx: Floats,
    dresidual: Floats | None,
    sum_dy: Channels,
    sum_dy_xhat: Channels,
    relu: bool,
    num_threads: int,
) -> None: ...
