"""Gradient matching for PyTorch: a loss term that makes a model's input derivatives match known ones."""

from typing import Any, Self

from torch import Tensor

from gradwise_torch._derivative_loss import DerivativeLoss
from gradwise_torch._linearize import Model
from gradwise_torch._matching_goals import Targets

__all__ = ["GradientMatching"]


class GradientMatching(DerivativeLoss):
    """Loss term that makes a model's input derivatives match known ones (Sobolev training, Jacobian matching).

    With standard deviations sigma_x of the inputs and sigma_y of the outputs, each output contributes
    ``weight * sigma_y**2 * mean_i sum_j sigma_xj**2 (J_ij - T_ij)**2 / mean_i sum_j sigma_xj**2 T_ij**2`` and the loss
    is the mean over outputs. It has the units of a mean squared error of y: at weight 1 a relative error of the
    derivatives counts like a relative error of the values. Add it to the loss of the values, which alone fixes the
    offset. Costs about one more backward pass for each output in every evaluated call.

    Not for derivatives with respect to parameters (data-set condensation), and of little use for models whose
    derivatives are piecewise constant (a ReLU network cannot move its kinks by this loss). Noise in the derivatives of
    about half their size makes them worthless; use a smaller weight or "huber" before that.

    Parameters
    ----------
    derivative_weight : float or callable, default 1.0
        Weight of the term, without unit; a callable receives the number of training calls so far (a schedule). At 0
        nothing is computed and no targets are needed.
    scale : {"block", "per_input", "none"}, default "block"
        "block" is the formula above: one denominator for an output. "per_input" divides every input's derivatives by
        their own root mean square, floored at a tenth of the largest, so that all inputs count alike. "none" uses
        raw derivatives, ``weight * mean_i sum_j (J_ij - T_ij)**2``.
    projections : int, optional
        Match this many outputs of each sample, drawn anew in every call without replacement, instead of all: an
        unbiased estimate that costs so many backward passes. Exact from `n_outputs` on.
    loss : {"mse", "huber"}, default "mse"
        "huber" grows linearly beyond the size of a typical entry, ``sigma_y / sqrt(n_inputs)`` (1 for scale "none").
    interval : int, default 1
        Evaluate every so many training calls, starting with the first, and multiply by `interval`; the other calls
        return 0 and cost no derivative.
    reduction : {"mean", "sum", "none"}, default "mean"
        "none" returns one term for each sample, whose mean is the "mean" and whose sum is the "sum". In distributed
        training "mean" divides by the number of known entries in all processes, so that averaged gradients are those
        of the whole batch.
    seed : int, optional
        Seed of the draws of `projections`; by default `torch.initial_seed()` at construction.

    Attributes
    ----------
    calls : Tensor
        Number of training calls so far (a buffer).

    Notes
    -----
    The scales come from `fit`, once, are saved in `state_dict` and never change. Without `fit` the first training batch
    sets them, with a warning, and since its y is unknown, sigma_y is replaced by the standard deviation of y to first
    order in x. Under evaluation (`matching.eval()`, `no_grad`, `inference_mode`) every call evaluates, nothing is
    counted, no second graph is built, and processes do not talk to each other.

    Second derivatives cost one more backward pass for each output and direction, three times differentiated. Scale
    "block" of H v is ``sigma_y**2 * mean_id sum_j sigma_xj**2 (Hv - T)**2 / mean_id sum_j sigma_xj**2 T**2`` over
    samples i and directions d: a relative error of the second derivatives counts like a relative error of the values,
    whatever the units and the length of v. Entry j of H v with v along input k is the mixed derivative by j and k; NaN
    in the others leaves one alone (an option's gamma). Values, first and second derivatives in one forward pass are two
    of these losses over the same outputs, see the last example. Layer and instance normalisation are then computed by
    their formulas, as torch gets their third derivatives wrong; outputs that went through torch's own are refused.

    In the first training call a model that is linear between kinks (ReLU) gives a warning, or an error for second
    derivatives, and so does, some steps later, a model whose offset nothing trains. Not in distributed training.

    Batch normalisation in training mode couples rows: derivatives are then taken with running statistics, see
    `value_and_jacobian`. Activation checkpointing of such layers is not supported.

    Models sharded by FSDP2 (`fully_shard`) need nothing else: their parameters are gathered once more in the backward
    pass of the loss, all at the same time. FSDP1 is refused.

    Examples
    --------
    >>> import torch
    >>> from gradwise.torch import GradientMatching
    >>> _ = torch.manual_seed(0)
    >>> x = torch.linspace(-2, 2, 20)[:, None]
    >>> y, dydx = torch.sin(x), torch.cos(x)
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    >>> matching = GradientMatching().fit(x, y, dydx)
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    >>> for _ in range(200):
    ...     prediction, derivative_loss = matching.with_values(model, x, dydx)
    ...     loss = torch.nn.functional.mse_loss(prediction, y) + derivative_loss
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    >>> loss.item() < 0.01
    True

    Forces are minus the derivative of the energy; outputs that are already computed will do:

    >>> positions = torch.randn(5, 3, requires_grad=True)
    >>> stiffness = torch.nn.Parameter(torch.tensor(2.0))
    >>> energy = stiffness * (positions**2).sum()
    >>> raw = GradientMatching(scale="none")
    >>> loss = raw.from_outputs(energy, wrt=positions, target=-4 * positions.detach(), sign=-1)
    >>> loss.item()
    0.0

    Values, slopes and curvatures, each with its weight, in one forward pass:

    >>> curvature = -torch.sin(x)
    >>> first = GradientMatching().fit(x, y, dydx)
    >>> second = GradientMatching(0.1).fit(x, y, target_hvp=curvature)
    >>> leaf, v = x.clone().requires_grad_(), torch.ones_like(x)
    >>> prediction = model(leaf)
    >>> loss = (
    ...     torch.nn.functional.mse_loss(prediction, y)
    ...     + first.from_outputs(prediction, wrt=leaf, target=dydx)
    ...     + second.from_outputs(prediction, wrt=leaf, tangents=v, target_hvp=curvature)
    ... )
    """

    def fit(
        self,
        X: Any,
        y: Any = None,
        dydx: Any = None,
        *,
        mask: Any = None,
        target_jvp: Any = None,
        target_hvp: Any = None,
        target_curvature: Any = None,
    ) -> Self:
        """Set the scales from training data, once.

        Parameters
        ----------
        X : Tensor or array of shape (n, ...)
            Inputs, any number of rows: a sample of the training data will do.
        y : Tensor or array of shape (n,) or (n, ...), optional
            Values. Without them sigma_y is the standard deviation of y to first order in x. For forces, repeat each
            structure's energy for its atoms: ``energies[structure_of_atom]``.
        dydx : Tensor or array, optional
            Derivatives, shaped like `target_jacobian`, in units of y per unit of x; NaN means unknown.
        mask : boolean Tensor or array of the shape of the derivatives, optional
            False means unknown.
        target_jvp, target_hvp, target_curvature : Tensor or array, optional
            Instead of `dydx`: directional or second derivatives, as in a call.

        Returns
        -------
        GradientMatching
            The module itself.

        Raises
        ------
        ValueError
            If shapes do not belong together, or not exactly one kind of derivatives is given.
        """
        targets = {"dydx": dydx, "target_jvp": target_jvp, "target_hvp": target_hvp}
        self.scales.fit(X, y, mask=mask, **targets, target_curvature=target_curvature)
        return self

    def forward(
        self,
        model: Model,
        x: Tensor,
        target_jacobian: Tensor | None = None,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        *,
        tangents: Tensor | None = None,
        target_jvp: Tensor | None = None,
        target_norm: Tensor | float | None = None,
        target_hvp: Tensor | None = None,
        target_curvature: Tensor | None = None,
    ) -> Tensor:
        """Loss of the derivatives of `model` at `x`; see `with_values` to have the outputs from the same forward pass.

        Parameters
        ----------
        model : callable
            A module (compiled or not) or function of one tensor that treats the rows of a batch independently.
        x : Tensor of shape (batch, ...)
            Inputs, of any rank.
        target_jacobian : Tensor, optional
            Known derivatives, in units of y per unit of x: shape (batch, n_outputs, n_inputs), or
            (batch, n_outputs, *shape of an input) or, for one output, the shape of `x`. NaN means unknown. None means
            zero (Jacobian regularisation, R1 penalty) and needs scale "none".
        mask : boolean Tensor of the target's shape, optional
            False means unknown.
        sample_weight : Tensor of shape (batch,), optional
            Non-negative weights without unit; only their ratios matter.
        tangents : Tensor of shape (batch, ...) like `x`, or (batch, n_directions, ...), optional
            Directions v in units of x, for targets that are known only along directions, and for second derivatives.
        target_jvp : Tensor of shape (batch, n_outputs), or (batch, n_outputs, n_directions), optional
            Known derivatives along `tangents`, in units of y; (batch,) will do for one output. Scale "block" gives
            ``sigma_y**2 * mean r**2 / mean target**2``.
        target_hvp : Tensor, optional
            Known second derivatives: the Hessian times each of `tangents`, H v, in units of y per unit of x. Shape
            (batch, n_outputs, n_inputs) or the others of `target_jacobian`; for tangents with an axis of directions
            (batch, n_outputs, n_directions, n_inputs), or with the shape of an input last, or for one output the shape
            of `tangents`. See Notes.
        target_curvature : Tensor, optional
            Known second derivatives along `tangents`, ``v' H v`` in units of y, shaped and scaled like `target_jvp`.
        target_norm : float or Tensor of shape (batch,) or (batch, n_outputs), optional
            Known norms of each sample's gradient of each output (WGAN-GP: 1). Needs scale "none".

        Returns
        -------
        Tensor of shape () or, for reduction "none", (batch,)
            The loss in squared units of y (scale "none": of the derivatives), float32 or wider.

        Raises
        ------
        ValueError
            If shapes are not exactly those above, targets contradict each other, or y does not depend on x.
        TypeError
            If `mask` is not boolean, x or y is not a floating-point tensor, or the model is sharded by FSDP1.
        RuntimeError
            In the first training call, if the model cannot be differentiated twice or the loss reaches no parameter.
        """
        targets = Targets(
            target_jacobian, mask, sample_weight, tangents, target_jvp, target_norm, target_hvp, target_curvature
        )
        return self._run(model, x, targets, values=False)[1]

    def with_values(
        self,
        model: Model,
        x: Tensor,
        target_jacobian: Tensor | None = None,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        *,
        tangents: Tensor | None = None,
        target_jvp: Tensor | None = None,
        target_norm: Tensor | float | None = None,
        target_hvp: Tensor | None = None,
        target_curvature: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs of `model` and the loss of its derivatives, in one forward pass; parameters as for a plain call.

        Returns
        -------
        y : Tensor
            What ``model(x)`` returns, with its graph if gradients are enabled.
        loss : Tensor
            As for a plain call.
        """
        targets = Targets(
            target_jacobian, mask, sample_weight, tangents, target_jvp, target_norm, target_hvp, target_curvature
        )
        y, loss = self._run(model, x, targets, values=True)
        if y is None:
            y = model(x)
        return y, loss

    def from_outputs(
        self,
        y: Tensor,
        *,
        wrt: Tensor,
        target: Tensor | None = None,
        sign: int = 1,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        tangents: Tensor | None = None,
        target_jvp: Tensor | None = None,
        target_norm: Tensor | float | None = None,
        target_hvp: Tensor | None = None,
        target_curvature: Tensor | None = None,
    ) -> Tensor:
        """Loss of the derivatives of outputs that are already computed, for example of a graph or a dict batch.

        Parameters
        ----------
        y : Tensor
            Outputs: (batch, n_outputs) for the rows of `wrt`; or one value for each of any number of structures (or a
            single one), whose sum is differentiated: energies.
        wrt : Tensor of shape (rows, ...)
            A tensor that required gradients before `y` was computed from it: atoms x 3.
        target : Tensor, optional
            Known derivatives, times `sign`, shaped like `target_jacobian` of a plain call: atoms x 3. None means zero.
        sign : {1, -1}, default 1
            -1 for forces, which are minus the derivative of the energy.
        mask, sample_weight, tangents, target_jvp, target_norm, target_hvp, target_curvature : optional
            As for a plain call, for the rows of `wrt`. Rows that share an output have one Hessian and one v.

        Returns
        -------
        Tensor of shape () or, for reduction "none", (rows,)
            The loss. The graph of `y` is kept.

        Raises
        ------
        ValueError
            If `wrt` does not require gradients, `y` does not depend on it, or shapes are wrong.

        Notes
        -----
        Run attention within `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` and models as given to torch.compile, not
        compiled: outputs that are already computed cannot be computed differently.
        """
        targets = Targets(
            target, mask, sample_weight, tangents, target_jvp, target_norm, target_hvp, target_curvature, "target"
        )
        return self._run_outputs(y, wrt, targets, sign)
