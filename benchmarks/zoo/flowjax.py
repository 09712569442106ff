"""FlowJAX's normalising flows: the log probability of points."""

from typing import Any

from benchmarks import zoo


def _flow(name: str, **options: Any) -> zoo.Network:
    import flowjax.distributions
    import flowjax.flows
    import jax
    import jax.numpy as jnp
    import paramax

    transformer = options.pop("spline", None)
    if transformer:
        import flowjax.bijections

        options["transformer"] = flowjax.bijections.RationalQuadraticSpline(knots=4, interval=3)

    make = getattr(flowjax.flows, name)
    base = flowjax.distributions.Normal(jnp.zeros(8))
    flow = make(jax.random.key(0), base_dist=base, **options)
    conditions = [zoo.normal(8, options["cond_dim"])] if "cond_dim" in options else []

    def call(flow: Any, *args: Any) -> Any:
        return flow.log_prob(*args)

    def is_constant(x: Any) -> bool:
        return isinstance(x, paramax.NonTrainable)

    return zoo.equinox_network(flow, zoo.normal(8, 8), *conditions, call=call, is_leaf=is_constant)


NETWORKS = zoo.table(
    _flow,
    {
        "coupling": dict(name="coupling_flow", flow_layers=2, nn_width=16),
        "coupling-deep": dict(name="coupling_flow", flow_layers=4, nn_width=16, nn_depth=3),
        "coupling-spline": dict(name="coupling_flow", flow_layers=2, nn_width=16, spline=True),
        "coupling-conditional": dict(name="coupling_flow", flow_layers=2, nn_width=16, cond_dim=4),
        "autoregressive": dict(name="masked_autoregressive_flow", flow_layers=2, nn_width=16),
        "autoregressive-spline": dict(
            name="masked_autoregressive_flow", flow_layers=2, nn_width=16, spline=True
        ),
        "autoregressive-conditional": dict(
            name="masked_autoregressive_flow", flow_layers=2, nn_width=16, cond_dim=4
        ),
        "block-neural": dict(name="block_neural_autoregressive_flow", nn_depth=2, nn_block_dim=4),
        "planar-conditional": dict(
            name="planar_flow", flow_layers=2, cond_dim=4, width_size=16, depth=1
        ),
        "triangular-spline": dict(name="triangular_spline_flow", flow_layers=2, knots=4),
    },
)
