"""Curvature of the validation loss in the logits (Zela et al. 2020, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from supernet.engine import frozen, kept_buffers
from supernet.strategies.state import SearchState


def largest_eigenvalue(product: Callable[[Tensor], Tensor], size: int, iterations: int) -> float:
    """Of a symmetric matrix, by Lanczos iterations with full orthogonalisation.

    Unlike the power method they do not mistake an eigenvalue far below zero for the largest, and
    `size` of them are exact.

    Args:
        product: the matrix times a vector, (size,) in float64.
        iterations: products at most.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    basis, diagonal, beside = [vector / vector.norm()], [], list[Tensor]()
    for _ in range(min(iterations, size)):
        image = product(basis[-1])
        diagonal.append(image @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):  # once leaves rounding errors that grow
            image = image - known.T @ (known @ image)
        norm = image.norm()
        if norm <= 1e-8 * max(1.0, abs(float(diagonal[-1]))):
            break  # what is left is invariant
        beside.append(norm)
        basis.append(image / norm)
    matrix = torch.diag(torch.stack(diagonal))
    for i, value in enumerate(beside[: len(diagonal) - 1]):
        matrix[i, i + 1] = matrix[i + 1, i] = value
    return float(torch.linalg.eigvalsh(matrix)[-1])


def curvature(state: SearchState, memory_format: torch.memory_format, iterations: int) -> float:
    """Largest eigenvalue of the Hessian, in all logits, of the loss on the first batch of the
    architecture half: the same in every epoch. Weights and statistics stay as they are."""
    problem, accelerator = state.problem, state.problem.accelerator
    images, labels = state.arch_stream.loader.batch(0, 0)
    logits = state.parameters()
    leaves = list(logits.values())
    generator = torch.Generator().manual_seed(problem.seed)  # drawn from by no mixture of all
    sample = problem.relaxation.for_architecture_step(logits, generator, 1.0)
    supernet = problem.supernet

    def flat(output: Tensor, create_graph: bool, direction: Tensor | None = None) -> Tensor:
        found = torch.autograd.grad(
            output, leaves, direction, retain_graph=True, create_graph=create_graph,
            allow_unused=True,
        )  # fmt: skip
        pairs = zip(found, leaves, strict=True)
        return torch.cat([torch.zeros_like(x) if g is None else g for g, x in pairs])

    with frozen(supernet), kept_buffers(supernet):
        outputs = supernet(images.to(memory_format=memory_format), sample.weights)
        gradient = flat(cross_entropy(outputs, labels), create_graph=True)

        def product(vector: Tensor) -> Tensor:
            image = flat(gradient, False, vector.to(gradient))
            mean: Tensor = accelerator.reduce(image, reduction="mean")
            return mean.double().cpu()

        return largest_eigenvalue(product, len(gradient), iterations)
