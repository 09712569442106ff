"""Keras 3's `keras.applications` on JAX, with their own widths, ten classes and small images."""

from typing import Any

from benchmarks import zoo

# The size of the image, and options.
CONFIGS: dict[str, tuple[Any, ...]] = {
    "ConvNeXtTiny": (32,),
    "ConvNeXtSmall": (32,),
    "DenseNet121": (32,),
    "DenseNet169": (32,),
    "DenseNet201": (32,),
    "EfficientNetB0": (32,),
    "EfficientNetB1": (32,),
    "EfficientNetB2": (32,),
    "EfficientNetB3": (32,),
    "EfficientNetB4": (32,),
    "EfficientNetV2B0": (32,),
    "EfficientNetV2B1": (32,),
    "EfficientNetV2B2": (32,),
    "EfficientNetV2B3": (32,),
    "EfficientNetV2S": (32,),
    "InceptionResNetV2": (75,),
    "InceptionV3": (75,),
    "MobileNet": (32,),
    "MobileNetV2": (32,),
    "MobileNetV3Large": (32,),
    "MobileNetV3Small": (32,),
    "NASNetMobile": (32,),
    "ResNet50": (32,),
    "ResNet50V2": (32,),
    "ResNet101": (32,),
    "ResNet101V2": (32,),
    "ResNet152": (32,),
    "ResNet152V2": (32,),
    "VGG16": (32,),
    "VGG19": (32,),
    "Xception": (71,),
}


def network(model: Any, *args: Any) -> zoo.Network:
    """A Keras model: its two lists of variables are keyed by path."""
    lists = model.trainable_variables, model.non_trainable_variables
    params = [{v.path: v.value for v in variables} for variables in lists]

    def fn(params: zoo.PyTree, *args: Any) -> Any:
        trainable, others = (
            [tree[v.path] for v in variables] for tree, variables in zip(params, lists, strict=True)
        )
        return model.stateless_call(trainable, others, *args, training=False)[0]

    return zoo.Network(fn, zoo.random(params), args)


def _application(name: str, size: int) -> zoo.Network:
    import keras

    shape = (size, size, 3)
    model = getattr(keras.applications, name)(weights=None, input_shape=shape, classes=10)
    return network(model, zoo.normal(1, *shape))


NETWORKS = zoo.table(_application, {name: (name, *config) for name, config in CONFIGS.items()})
