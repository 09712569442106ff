"""jraph's graph networks, with Flax's layers for their update functions."""

from collections.abc import Callable
from typing import Any

from benchmarks import zoo


def _graph() -> Any:
    import jraph
    import numpy as np

    senders = np.array([0, 1, 2, 3, 4, 0, 2, 5, 6, 5])
    receivers = np.array([1, 2, 3, 4, 0, 2, 4, 6, 5, 5])
    return jraph.GraphsTuple(
        nodes=zoo.normal(7, 6),
        edges=zoo.normal(10, 5),
        globals=zoo.normal(2, 4),
        senders=senders,
        receivers=receivers,
        n_node=np.array([5, 2]),
        n_edge=np.array([7, 3]),
    )


def _network(layer: Callable[[Any, Any, int], Any], rounds: int = 2) -> zoo.Network:
    """Rounds of a layer, and a readout of the nodes."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    class Net(nn.Module):
        @nn.compact
        def __call__(self, nodes: Any, edges: Any, globals_: Any) -> Any:
            graph = _graph()._replace(nodes=nodes, edges=edges, globals=globals_)
            for i in range(rounds):
                graph = layer(nn, graph, i)
                graph = graph._replace(nodes=jax.nn.relu(graph.nodes))
            return nn.Dense(3)(graph.nodes), jnp.sum(graph.nodes)

    graph = _graph()
    return zoo.linen_network(Net(), graph.nodes, graph.edges, graph.globals)


def _mlp(nn: Any, *features: int) -> Callable[..., Any]:
    import jax.numpy as jnp

    def update(*inputs: Any) -> Any:
        x = jnp.concatenate(inputs, -1)
        for n in features[:-1]:
            x = nn.relu(nn.Dense(n)(x))
        return nn.Dense(features[-1])(x)

    return update


def _graph_network(nn: Any, graph: Any, i: int) -> Any:
    import jraph

    def node(nodes: Any, sent: Any, received: Any, globals_: Any) -> Any:
        return _mlp(nn, 24, 16)(nodes, sent, received, globals_)

    def edge(edges: Any, sent: Any, received: Any, globals_: Any) -> Any:
        return _mlp(nn, 24, 12)(edges, sent, received, globals_)

    def whole(nodes: Any, edges: Any, globals_: Any) -> Any:
        return _mlp(nn, 24, 8)(nodes, edges, globals_)

    return jraph.GraphNetwork(edge, node, whole)(graph)


def _interaction(nn: Any, graph: Any, i: int) -> Any:
    import jraph

    net = jraph.InteractionNetwork(
        lambda edges, sent, received: _mlp(nn, 24, 12)(edges, sent, received),
        lambda nodes, received: _mlp(nn, 24, 16)(nodes, received),
    )
    return net(graph)


def _relation(nn: Any, graph: Any, i: int) -> Any:
    import jraph

    net = jraph.RelationNetwork(
        lambda sent, received: _mlp(nn, 24, 12)(sent, received),
        lambda edges: _mlp(nn, 24, 4)(edges),
    )
    out = net(graph)
    return out._replace(nodes=nn.Dense(16)(graph.nodes) + out.globals.sum(0)[:1])


def _deep_sets(nn: Any, graph: Any, i: int) -> Any:
    import jraph

    net = jraph.DeepSets(
        lambda nodes, globals_: _mlp(nn, 24, 16)(nodes, globals_),
        lambda nodes: _mlp(nn, 24, 8)(nodes),
    )
    return net(graph)


def _attention(nn: Any, graph: Any, i: int) -> Any:
    import jraph

    heads = 4
    nodes = nn.Dense(heads * 4)(graph.nodes).reshape(-1, heads, 4)

    def logits(sent: Any, received: Any, edges: Any) -> Any:
        import jax.numpy as jnp

        return nn.leaky_relu(nn.Dense(1)(jnp.concatenate([sent, received], -1)))

    return jraph.GAT(lambda x: x, logits)(graph._replace(nodes=nodes))


def _graph_attention(nn: Any, graph: Any, i: int) -> Any:
    import jraph

    net = jraph.GraphNetGAT(
        lambda edges, sent, received, _: _mlp(nn, 24, 12)(edges, sent, received),
        lambda nodes, sent, received, _: _mlp(nn, 24, 16)(nodes, sent, received),
        lambda edges, sent, received, _: nn.Dense(1)(edges),
        lambda edges, weights: edges * weights,
    )
    return net(graph._replace(globals=None))._replace(globals=graph.globals)


def _convolution(nn: Any, graph: Any, i: int) -> Any:
    import jraph

    return jraph.GraphConvolution(nn.Dense(16), add_self_edges=True)(graph)


LAYERS = {
    "GraphNetwork": _graph_network,
    "InteractionNetwork": _interaction,
    "RelationNetwork": _relation,
    "DeepSets": _deep_sets,
    "GAT": _attention,
    "GraphNetGAT": _graph_attention,
    "GraphConvolution": _convolution,
}
NETWORKS = zoo.table(_network, {name: (layer,) for name, layer in LAYERS.items()})
