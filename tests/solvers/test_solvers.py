"""Every solver against oracles: brute force, the textbook loop, and what must never happen."""

import itertools

import pytest
import torch

from vlmq.formats import FORMATS, get_format
from vlmq.linalg import damped, find_damping, inverse_factor, proxy_loss, shift_target
from vlmq.solvers import REFINEMENTS, SOLVERS, run_recipe
from vlmq.solvers.grid import fit_grid, fit_ternary, grid_values, round_to_grid

SINGLE = [s for s in SOLVERS if s not in ("ternary", "binary")]


def problem(out_features: int, in_features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moment of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=g) / in_features**0.5
    x = (
        torch.randn(6 * in_features, in_features, generator=g) @ mix
        + torch.randn(in_features, generator=g) * 0.3
    )
    return torch.randn(out_features, in_features, generator=g), x.T @ x / len(x)


def damped_copy(H: torch.Tensor) -> torch.Tensor:
    with damped(H, find_damping(H)):
        return H.clone()


def solve(recipe: str, W, H, format: str, group_size, **options):
    return run_recipe(
        recipe, W, W, H, get_format(format), group_size, generator=torch.Generator(), options=options
    )


def loss(quantized, W, H) -> float:
    return proxy_loss(quantized.dequantize(), W, H).sum().item()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("recipe", [*SINGLE, "gptq+cd", "kmeans+cd"])
@pytest.mark.parametrize("group_size", [16, None])
def test_solver_contract(recipe, format, group_size):
    W, H = problem(5, 37)
    quantized = solve(recipe, W, H, format, group_size)
    assert quantized.codes.shape == W.shape
    assert int(quantized.codes.max()) < get_format(format).n_levels
    assert torch.isfinite(quantized.dequantize()).all()
    assert loss(quantized, W, H) < proxy_loss(torch.zeros_like(W), W, H).sum().item()
    again = solve(recipe, W, H, format, group_size)
    assert torch.equal(quantized.codes, again.codes)
    assert torch.equal(quantized.scales, again.scales)


@pytest.mark.parametrize("recipe", ["ternary", "binary"])
@pytest.mark.parametrize("group_size", [16, None])
def test_lowbit_solvers_are_feedback_with_long_descent(recipe, group_size):
    W, H = problem(5, 37)
    for format in (f for f in FORMATS if f.startswith(recipe)):
        quantized = solve(recipe, W, H, format, group_size)
        same = solve("gptq+cd", W, H, format, group_size, n_sweeps=8)
        assert torch.equal(quantized.codes, same.codes)
        assert torch.equal(quantized.scales, same.scales)


@pytest.mark.parametrize("format", FORMATS)
def test_feedback_beats_rounding_and_descent_beats_feedback(format):
    W, H = problem(16, 64)
    rtn, gptq, cd = (loss(solve(r, W, H, format, 32), W, H) for r in ("rtn", "gptq", "gptq+cd"))
    assert gptq < rtn
    assert cd <= gptq


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_refinement_never_raises_the_damped_loss(format, start):
    W, H = problem(9, 50, seed=3)
    damped = damped_copy(H)
    before = solve(start, W, H, format, 16)
    rows = proxy_loss(before.dequantize(), W, damped)
    for refine in REFINEMENTS.values():
        after = proxy_loss(refine(before, W, H).dequantize(), W, damped)
        assert (after <= rows * (1 + 1e-4)).all()


def test_feedback_is_the_textbook_loop():
    """Same codes as Frantar et al.'s loop, column by column in float64, on a fixed grid."""
    W, H = problem(6, 24, seed=1)
    format = get_format("int4")
    quantized = solve("gptq", W, H, "int4", None, act_order=False, scale_factors=(1.0,))
    damped = damped_copy(H).double()
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    w = W.double().clone()
    scale = quantized.scales[:, 0, 0].double()
    zero = quantized.zeros[:, 0].double() * format.zero_step
    for j in range(24):
        code = (w[:, j] / scale + zero).round().clamp(0, 15)
        assert torch.equal(code, quantized.codes[:, j].double())
        e = (w[:, j] - scale * (code - zero)) / U[j, j]
        w[:, j:] -= e[:, None] * U[j, j:]


def test_descent_ends_in_a_coordinatewise_minimum():
    W, H = problem(3, 12, seed=2)
    quantized = solve("gptq+cd", W, H, "int2", None, n_sweeps=50, tolerance=0.0)
    damped = damped_copy(H)
    base = proxy_loss(quantized.dequantize(), W, damped)
    for column, code in itertools.product(range(12), range(4)):
        moved = quantized.codes.clone()
        moved[:, column] = code
        other = type(quantized)(moved, quantized.scales, quantized.zeros, quantized.format, None)
        assert (proxy_loss(other.dequantize(), W, damped) >= base * (1 - 1e-4)).all()


def test_exact_ternary_equals_brute_force():
    g = torch.Generator().manual_seed(0)
    w, h = torch.randn(20, 7, generator=g), torch.rand(20, 7, generator=g)
    grid = fit_ternary(w, h)
    codes, values = round_to_grid(w, grid, get_format("ternary"))
    error = (h * (w - values) ** 2).sum(1)
    best = torch.full((20,), float("inf"))
    for t in itertools.product((-1.0, 0.0, 1.0), repeat=7):
        t = torch.tensor(t).expand(20, 7)
        mass = (h * t * t).sum(1).clamp(min=1e-12)
        scale = (h * t * w).sum(1) / mass
        best = torch.minimum(best, (h * (w - scale[:, None] * t) ** 2).sum(1))
    torch.testing.assert_close(error, best, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "expected"),
    [("ternary", 0.1902), ("binary", 0.3634), ("int2", 0.1188), ("int3", 0.0374), ("int4", 0.0115)],
)
def test_gaussian_weights_reach_the_known_error(format, expected):
    """Mean squared error of the best scaled grid on a standard normal (uniform grids; Max 1960 for ints)."""
    w = torch.randn(4, 20000, generator=torch.Generator().manual_seed(0))
    grid = fit_grid(w, torch.ones(20000), get_format(format), n_steps=40)
    _, values = round_to_grid(w, grid, get_format(format))
    assert ((w - values) ** 2).mean().item() == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_takes_the_nearest_value(format):
    W, H = problem(8, 16)
    f = get_format(format)
    grid = fit_grid(W, torch.ones(16), f)
    codes, values = round_to_grid(W, grid, f)
    table = grid_values(grid, f)
    nearest = (W[..., None] - table[:, None]).abs().min(-1).values
    torch.testing.assert_close((W - values).abs(), nearest, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values, table.gather(1, codes.long()), rtol=1e-5, atol=1e-6)


def test_target_minimises_the_mismatched_objective():
    """||(What U - W F) S^(1/2)||^2 + lambda ||What - W||^2 equals the shifted quadratic up to a constant."""
    g = torch.Generator().manual_seed(0)
    W, F = torch.randn(3, 6, generator=g).double(), torch.randn(6, 40, generator=g).double()
    U, s = F + 0.3 * torch.randn(6, 40, generator=g), torch.rand(40, generator=g).double()
    damp = 0.1
    H = (U * s) @ U.T + damp * torch.eye(6, dtype=torch.float64)
    T = shift_target(W, W @ ((F - U) * s) @ U.T, H, 1.0)
    differences = []
    for _ in range(3):
        What = torch.randn(3, 6, generator=g).double()
        direct = (((What @ U - W @ F) ** 2) * s).sum() + damp * ((What - W) ** 2).sum()
        differences.append(direct - proxy_loss(What, T, H).sum())
    torch.testing.assert_close(torch.stack(differences), differences[0].expand(3), rtol=1e-8, atol=1e-8)


def test_dead_inputs_do_no_harm():
    W, H = problem(4, 20)
    H[3], H[:, 3] = 0, 0
    quantized = solve("gptq+cd", W, H, "int4", 16)
    assert torch.isfinite(quantized.dequantize()).all()


def test_column_order_leaves_the_result_of_rounding_to_nearest():
    W, H = problem(4, 32)
    flipped = solve("rtn", W.flip(1), H.flip(0, 1), "int3", None)
    straight = solve("rtn", W, H, "int3", None)
    torch.testing.assert_close(flipped.dequantize().flip(1), straight.dequantize())


def test_bad_names_options_and_hessians_are_named():
    W, H = problem(4, 16)
    with pytest.raises(ValueError, match="solver 'gptqq' is unknown; known: rtn"):
        solve("gptqq", W, H, "int4", None)
    with pytest.raises(ValueError, match="takes no damping; known: .*damp"):
        solve("gptq+cd", W, H, "int4", None, damping=0.1)
    with pytest.raises(ValueError, match="ternary formats only, got format 'int4'; leave the solver out"):
        solve("ternary", W, H, "int4", None)
    with pytest.raises(TypeError, match='option damp expects a finite number, got "much"'):
        solve("gptq", W, H, "int4", None, damp="much")
    with pytest.raises(ValueError, match="option n_sweeps must not be below 0, got -1"):
        solve("cd", W, H, "int4", None, n_sweeps=-1)
    H[2, 2] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        solve("gptq", W, H, "int4", None)


def test_damping_is_raised_and_recorded():
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 1.05
    damping = find_damping(H, 0.01)
    assert damping.n_retries == 1
    assert damping.damp == pytest.approx(0.1)
    H[0, 1] = H[1, 0] = 1e6
    with pytest.raises(RuntimeError, match="smallest eigenvalue"):
        find_damping(H, 1e-9)


def test_a_hessian_is_damped_in_place_and_left_as_it_was():
    _, H = problem(1, 12)
    H[3] = H[:, 3] = 0
    before, damping = H.clone(), find_damping(H)
    assert torch.equal(H, before)
    with damped(H, damping):
        assert torch.allclose(H - before, torch.diag(damping.diagonal - before.diagonal()))
        assert H[3, 3] == before.diagonal().mean()
        U = inverse_factor(H.clone())
        assert U is not None
        assert torch.allclose(U.T @ U @ H, torch.eye(12), atol=1e-4)
    assert torch.equal(H, before)
    assert inverse_factor(-H) is None


@pytest.mark.parametrize("format", ["int2", "int4-sym"])
def test_no_steps_take_the_full_range(format):
    W = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    f = get_format(format)
    full, fitted = (fit_grid(W, torch.ones(16), f, n_steps=n) for n in (0, 8))
    reach = 3 if format == "int2" else 8
    extent = W.amax(1).clamp(min=0) - W.amin(1).clamp(max=0) if format == "int2" else W.abs().amax(1)
    assert torch.allclose(full.scales[:, 0] * reach, extent, rtol=2e-3)
    errors = [((W - round_to_grid(W, g, f)[1]) ** 2).sum() for g in (full, fitted)]
    assert errors[1] < errors[0]
