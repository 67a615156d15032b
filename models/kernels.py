"""Triton kernels that excite the weights of many layers at once; gpu.py says in which order they run.

What takes a GPU's time here is memory and launches. So a kernel works on all layers, whose tensors it finds by their
addresses, and its programs have one filter each, or one tile of a matrix product. Both passes together fetch or write
weights and their gradients nine times; what a program reads again is in its cache. With V the gated weight and MA the
map's pole:

    forward    statistics, relative       mean and deviation of each filter, and the statistic that drives the gates
               hidden_features, gates     the gates' two layers
               largest, excited           max |V| of each layer, then map(V)
    backward   gates_gradient             the gradient of the gates' second layer's output
               hidden_gradient, layer_gradients, statistic_gradient, relative_gradient
                                          those of the gates' first layer's output, of both layers, of the statistic
               raw_gradient               that of the raw weight, in place of that of the excited weight

The elements of a filter lie side by side in either memory layout; the layouts differ in where an input channel's are.
Importing this file needs Triton, which PyTorch brings for Linux. With TRITON_INTERPRET=1, a CPU runs the kernels.
"""

import triton
import triton.language as tl

# The rows of the table of layers. Its columns are the layers, and as many more as make a power of two.
FIRST = tl.constexpr(0)  # place of its first filter among all layers'; in columns without a layer, beyond all of them
RAW = tl.constexpr(1)  # address of the raw weight
EXCITED = tl.constexpr(2)  # address of the excited weight or, in the backward pass, its gradient; 0 where there is none
INPUTS = tl.constexpr(3)  # input channels of a filter
LOCATIONS = tl.constexpr(4)  # elements of a filter for each of them
INPUT_STRIDE = tl.constexpr(5)  # elements from one input channel to the next
LOCATION_STRIDE = tl.constexpr(6)
GATE_ROWS = tl.constexpr(7)  # rows of the gate's statistic: 1 of the channel gate, one for each filter of the other
GATE_FEATURES = tl.constexpr(8)  # columns of it, as many as the gate has outputs
GATE_HIDDEN = tl.constexpr(9)  # columns between the gate's two layers
GATES = tl.constexpr(10)  # place of the layer's first gate among all layers'
HIDDEN = tl.constexpr(11)  # place of its first hidden feature
PARAMETERS = tl.constexpr(12)  # addresses of weight 1, bias 1, weight 2, bias 2
GRADIENTS = tl.constexpr(16)  # addresses of their gradients
ROWS = 20

NO_GATE, CHANNEL, LOCATION = (tl.constexpr(kind) for kind in range(3))


@triton.jit
def nothing(given):
    """Shows whether kernels can be launched."""


@triton.jit
def _entry(TABLE, row, layer, LAYERS: tl.constexpr):
    return tl.load(TABLE + row * LAYERS + layer)


@triton.jit
def _layer(TABLE, filter, LAYERS: tl.constexpr):
    """The layer of a filter, and the filter's place in it."""
    first = tl.load(TABLE + FIRST * LAYERS + tl.arange(0, LAYERS))
    layer = tl.sum((first <= filter).to(tl.int32), 0) - 1
    return layer, filter - _entry(TABLE, FIRST, layer, LAYERS)


@triton.jit
def _elements(TABLE, layer, LAYERS: tl.constexpr):
    """How many elements a filter has."""
    return (_entry(TABLE, INPUTS, layer, LAYERS) * _entry(TABLE, LOCATIONS, layer, LAYERS)).to(tl.int32)


@triton.jit
def _filter(TABLE, row, layer, place, like, LAYERS: tl.constexpr):
    """A pointer to the filter in the weight whose address is in this row."""
    start = _entry(TABLE, row, layer, LAYERS).to(like.dtype)
    return start + place * _elements(TABLE, layer, LAYERS)


@triton.jit
def _gains(gates, TABLE, layer, place, element, inside, GATE: tl.constexpr, LAYERS: tl.constexpr):
    """The gates of a filter's elements."""
    gates += _entry(TABLE, GATES, layer, LAYERS)
    if GATE == CHANNEL:
        gains = tl.load(gates + place)
    else:
        inputs = _entry(TABLE, INPUTS, layer, LAYERS).to(tl.int32)
        stride = _entry(TABLE, INPUT_STRIDE, layer, LAYERS).to(tl.int32)
        gains = tl.load(gates + place * inputs + element // stride % inputs, mask=inside, other=0)
    return gains


@triton.jit
def _gated(
    raw, element, inside, mean, scale, gates, TABLE, filter, layer, place, STANDARDIZED: tl.constexpr,
    GATE: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """V of a filter's elements."""
    weight = tl.load(raw + element, mask=inside, other=0)
    if STANDARDIZED:
        weight = (weight - tl.load(mean + filter)) * tl.load(scale + filter)
    if GATE != NO_GATE:
        weight *= _gains(gates, TABLE, layer, place, element, inside, GATE, LAYERS)
    return weight


@triton.jit
def _pole(limits, layer, MARGIN: tl.constexpr):
    """MA; of a layer of zeros, whose map is zero at any pole, 1."""
    limit = tl.load(limits + layer) * MARGIN
    return tl.where(limit > 0, limit, 1)


@triton.jit
def _twice_atanh(ratio):
    """log(1 + x) with x = 2 q / (1 - q); the factor mends what 1 + x loses in rounding (Kahan)."""
    x = 2 * ratio / (1 - ratio)
    near = 1 + x
    return tl.where(near == 1, x, tl.log(near) * x / tl.where(near == 1, 1, near - 1))


@triton.jit
def statistics(
    TABLE, mean, scale, statistic, STANDARDIZED: tl.constexpr, GATE: tl.constexpr, EPSILON: tl.constexpr,
    LAYERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A filter's mean and 1 / (deviation + epsilon), and the statistic that drives its gates.

    ``scale`` has another row for 1 / ((n - 1) deviation), or 0 for a constant filter.
    """
    filter = tl.program_id(0)
    layer, place = _layer(TABLE, filter, LAYERS)
    raw, count = _filter(TABLE, RAW, layer, place, mean, LAYERS), _elements(TABLE, layer, LAYERS)
    center, factor = 0.0, 1.0
    total = tl.zeros((BLOCK,), mean.dtype.element_ty)
    magnitude = tl.zeros((BLOCK,), mean.dtype.element_ty)
    for start in range(0, count, BLOCK):
        element = start + tl.arange(0, BLOCK)
        weight = tl.load(raw + element, mask=element < count, other=0)
        total += weight
        magnitude += tl.abs(weight)
    if STANDARDIZED:
        center = tl.sum(total, 0) / count
        squares = tl.zeros((BLOCK,), mean.dtype.element_ty)
        for start in range(0, count, BLOCK):
            element = start + tl.arange(0, BLOCK)
            weight = tl.load(raw + element, mask=element < count, other=0)
            centered = tl.where(element < count, weight - center, 0)
            squares += centered * centered
        deviation = tl.sqrt(tl.sum(squares, 0) / (count - 1))
        factor = 1 / (deviation + EPSILON)
        tl.store(mean + filter, center)
        tl.store(scale + filter, factor)
        along = tl.where(deviation > 0, 1 / ((count - 1) * tl.where(deviation > 0, deviation, 1)), 0)
        tl.store(scale + tl.num_programs(0) + filter, along)
    if GATE != NO_GATE:
        statistic += _entry(TABLE, GATES, layer, LAYERS)
    if GATE == CHANNEL:
        tl.store(statistic + place, tl.sum(magnitude, 0) / count)
    if GATE == LOCATION:
        inputs = _entry(TABLE, INPUTS, layer, LAYERS).to(tl.int32)
        locations = _entry(TABLE, LOCATIONS, layer, LAYERS).to(tl.int32)
        input_stride = _entry(TABLE, INPUT_STRIDE, layer, LAYERS).to(tl.int32)
        location_stride = _entry(TABLE, LOCATION_STRIDE, layer, LAYERS).to(tl.int32)
        for start in range(0, inputs, BLOCK):
            input = start + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), mean.dtype.element_ty)
            for location in range(locations):
                element = input * input_stride + location * location_stride
                total += tl.load(raw + element, mask=input < inputs, other=0)
            value = (total / locations - center) * factor
            tl.store(statistic + place * inputs + input, value, mask=input < inputs)


@triton.jit
def relative(TABLE, statistic, size, EPSILON: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr):
    """The channel gate's statistic: mean |W_o| over its mean in the layer, which goes to ``size``."""
    layer = tl.program_id(0)
    filters = _entry(TABLE, GATE_FEATURES, layer, LAYERS).to(tl.int32)
    statistic += _entry(TABLE, GATES, layer, LAYERS)
    total = tl.zeros((BLOCK,), size.dtype.element_ty)
    for start in range(0, filters, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(statistic + place, mask=place < filters, other=0)
    mean = tl.sum(total, 0) / filters + EPSILON
    tl.store(size + layer, mean)
    for start in range(0, filters, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(statistic + place, mask=place < filters, other=0)
        tl.store(statistic + place, value / mean, mask=place < filters)


@triton.jit
def relative_gradient(TABLE, statistic, size, gradient, LAYERS: tl.constexpr, BLOCK: tl.constexpr):
    """That of an element's magnitude, in place of the gradient of the statistic."""
    layer = tl.program_id(0)
    if _entry(TABLE, EXCITED, layer, LAYERS) == 0:
        return
    filters = _entry(TABLE, GATE_FEATURES, layer, LAYERS).to(tl.int32)
    statistic += _entry(TABLE, GATES, layer, LAYERS)
    gradient += _entry(TABLE, GATES, layer, LAYERS)
    total = tl.zeros((BLOCK,), size.dtype.element_ty)
    for start in range(0, filters, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(statistic + place, mask=place < filters, other=0)
        total += value * tl.load(gradient + place, mask=place < filters, other=0)
    mean = tl.sum(total, 0) / filters
    factor = 1 / (tl.load(size + layer) * _elements(TABLE, layer, LAYERS))
    for start in range(0, filters, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(gradient + place, mask=place < filters, other=0)
        tl.store(gradient + place, (value - mean) * factor, mask=place < filters)


@triton.jit
def largest(
    TABLE, mean, scale, gates, limits, STANDARDIZED: tl.constexpr, GATE: tl.constexpr,
    LAYERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """max |V| of each layer, into ``limits``, which must be zeros."""
    filter = tl.program_id(0)
    layer, place = _layer(TABLE, filter, LAYERS)
    raw, count = _filter(TABLE, RAW, layer, place, mean, LAYERS), _elements(TABLE, layer, LAYERS)
    most = tl.zeros((BLOCK,), mean.dtype.element_ty)
    for start in range(0, count, BLOCK):
        element = start + tl.arange(0, BLOCK)
        inside = element < count
        weight = _gated(
            raw, element, inside, mean, scale, gates, TABLE, filter, layer, place, STANDARDIZED, GATE, LAYERS
        )
        most = tl.maximum(most, tl.where(inside, tl.abs(weight), 0))
    tl.atomic_max(limits + layer, tl.max(most, 0))


@triton.jit
def excited(
    TABLE, mean, scale, gates, limits, STANDARDIZED: tl.constexpr, GATE: tl.constexpr, MAPPED: tl.constexpr,
    MARGIN: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The excited weight."""
    filter = tl.program_id(0)
    layer, place = _layer(TABLE, filter, LAYERS)
    raw, count = _filter(TABLE, RAW, layer, place, mean, LAYERS), _elements(TABLE, layer, LAYERS)
    result = _filter(TABLE, EXCITED, layer, place, mean, LAYERS)
    for start in range(0, count, BLOCK):
        element = start + tl.arange(0, BLOCK)
        inside = element < count
        weight = _gated(
            raw, element, inside, mean, scale, gates, TABLE, filter, layer, place, STANDARDIZED, GATE, LAYERS
        )
        if MAPPED:
            pole = _pole(limits, layer, MARGIN)
            twice = _twice_atanh(tl.where(inside, weight / pole, 0))
            weight = pole * 0.5 * twice
        tl.store(result + element, weight, mask=inside)


@triton.jit
def gates_gradient(
    TABLE, mean, scale, gates, limits, gradient, STANDARDIZED: tl.constexpr, GATE: tl.constexpr, MAPPED: tl.constexpr,
    MARGIN: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """That of what the sigmoid of a filter's gates is taken of: (dL/dV . Z) a (1 - a), with Z the weight as gated."""
    filter = tl.program_id(0)
    layer, place = _layer(TABLE, filter, LAYERS)
    if _entry(TABLE, EXCITED, layer, LAYERS) == 0:
        return
    raw = _filter(TABLE, RAW, layer, place, mean, LAYERS)
    upstream = _filter(TABLE, EXCITED, layer, place, mean, LAYERS)
    inputs = _entry(TABLE, INPUTS, layer, LAYERS).to(tl.int32)
    locations = _entry(TABLE, LOCATIONS, layer, LAYERS).to(tl.int32)
    input_stride = _entry(TABLE, INPUT_STRIDE, layer, LAYERS).to(tl.int32)
    location_stride = _entry(TABLE, LOCATION_STRIDE, layer, LAYERS).to(tl.int32)
    center, factor, pole = 0.0, 1.0, 1.0
    if STANDARDIZED:
        center, factor = tl.load(mean + filter), tl.load(scale + filter)
    if MAPPED:
        pole = _pole(limits, layer, MARGIN)
    gates += _entry(TABLE, GATES, layer, LAYERS)
    gradient += _entry(TABLE, GATES, layer, LAYERS)
    if GATE == CHANNEL:  # all elements have one gate
        inputs, locations, input_stride = inputs * locations, 1, 1
    dot = tl.zeros((BLOCK,), mean.dtype.element_ty)
    for start in range(0, inputs, BLOCK):
        input = start + tl.arange(0, BLOCK)
        inside = input < inputs
        if GATE == CHANNEL:
            gate = tl.load(gates + place)
        else:
            gate = tl.load(gates + place * inputs + input, mask=inside, other=0)
            dot = tl.zeros((BLOCK,), mean.dtype.element_ty)
        for location in range(locations):
            element = input * input_stride + location * location_stride
            weight = (tl.load(raw + element, mask=inside, other=0) - center) * factor
            slope = tl.load(upstream + element, mask=inside, other=0)
            if MAPPED:  # df/dV = 1 / (1 - (V / MA)^2)
                ratio = tl.where(inside, weight * gate / pole, 0)
                slope /= 1 - ratio * ratio
            dot += slope * weight
        if GATE == LOCATION:
            tl.store(gradient + place * inputs + input, dot * gate * (1 - gate), mask=inside)
    if GATE == CHANNEL:
        gate = tl.load(gates + place)
        tl.store(gradient + place, tl.sum(dot, 0) * gate * (1 - gate))


@triton.jit
def raw_gradient(
    TABLE, mean, scale, gates, limits, statistic_gradient, STANDARDIZED: tl.constexpr, GATE: tl.constexpr,
    MAPPED: tl.constexpr, MARGIN: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """That of a filter of the raw weight, written over that of the excited one.

    With Z = (W - mean) / (s + e): dL/dW = (dL/dZ - its mean) / (s + e) - (dL/dZ . Z) Z / ((n - 1) s).
    """
    filter = tl.program_id(0)
    layer, place = _layer(TABLE, filter, LAYERS)
    if _entry(TABLE, EXCITED, layer, LAYERS) == 0:
        return
    raw, count = _filter(TABLE, RAW, layer, place, mean, LAYERS), _elements(TABLE, layer, LAYERS)
    upstream = _filter(TABLE, EXCITED, layer, place, mean, LAYERS)
    center, factor, along, pole = 0.0, 1.0, 0.0, 1.0
    if STANDARDIZED:
        center, factor = tl.load(mean + filter), tl.load(scale + filter)
        along = tl.load(scale + tl.num_programs(0) + filter)
    if MAPPED:
        pole = _pole(limits, layer, MARGIN)
    magnitude = 0.0
    if GATE != NO_GATE:
        statistic_gradient += _entry(TABLE, GATES, layer, LAYERS)
    if GATE == CHANNEL:
        magnitude = tl.load(statistic_gradient + place)
    inputs = _entry(TABLE, INPUTS, layer, LAYERS).to(tl.int32)
    locations = _entry(TABLE, LOCATIONS, layer, LAYERS).to(tl.int32)
    input_stride = _entry(TABLE, INPUT_STRIDE, layer, LAYERS).to(tl.int32)
    total = tl.zeros((BLOCK,), mean.dtype.element_ty)
    dot = tl.zeros((BLOCK,), mean.dtype.element_ty)
    for writes in tl.static_range(2):  # the first time for the sums, which only standardized filters need
        if STANDARDIZED or writes:
            average, dots = tl.sum(total, 0) / count, tl.sum(dot, 0) * along
            for start in range(0, count, BLOCK):
                element = start + tl.arange(0, BLOCK)
                inside = element < count
                weight = tl.load(raw + element, mask=inside, other=0)
                standard = tl.where(inside, (weight - center) * factor, 0)
                slope = tl.load(upstream + element, mask=inside, other=0)
                gain = 1.0
                if GATE != NO_GATE:
                    gain = _gains(gates, TABLE, layer, place, element, inside, GATE, LAYERS)
                if MAPPED:
                    ratio = standard * gain / pole
                    slope /= 1 - ratio * ratio
                slope *= gain
                if GATE == LOCATION:
                    input = element // input_stride % inputs
                    through = tl.load(statistic_gradient + place * inputs + input, mask=inside, other=0)
                    slope += through / locations
                if writes:
                    if STANDARDIZED:
                        slope = (slope - average) * factor - standard * dots
                    if GATE == CHANNEL:
                        sign = tl.where(weight > 0, 1.0, tl.where(weight < 0, -1.0, 0.0))
                        slope += sign * magnitude
                    tl.store(upstream + element, slope, mask=inside)
                else:
                    total += slope
                    dot += slope * standard


@triton.jit
def _product(
    left, left_row, left_inner, right, right_inner, right_column, rows, inner, columns, top, begin,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The tile at (top, begin) of the product of two matrices, and the sums of the first one's rows there."""
    row, column = top + tl.arange(0, M), begin + tl.arange(0, N)
    result = tl.zeros((M, N), left.dtype.element_ty)
    sums = tl.zeros((M,), left.dtype.element_ty)
    for start in range(0, inner, K):
        k = start + tl.arange(0, K)
        a = left + row[:, None] * left_row + k[None, :] * left_inner
        b = right + k[:, None] * right_inner + column[None, :] * right_column
        a = tl.load(a, mask=(row[:, None] < rows) & (k[None, :] < inner), other=0)
        b = tl.load(b, mask=(k[:, None] < inner) & (column[None, :] < columns), other=0)
        result += tl.dot(a, b, input_precision="ieee", out_dtype=left.dtype.element_ty)
        sums += tl.sum(a, 1)
    return result, sums


@triton.jit
def _tile(rows, columns, M: tl.constexpr, N: tl.constexpr):
    """This program's tile of a matrix: its first row and column, and whether there is such a tile."""
    across = tl.cdiv(columns, N)
    down = tl.program_id(0) // across
    return down * M, tl.program_id(0) % across * N, down < tl.cdiv(rows, M)


@triton.jit
def _sizes(TABLE, layer, LAYERS: tl.constexpr):
    """Rows, features and hidden features of the gate."""
    rows = _entry(TABLE, GATE_ROWS, layer, LAYERS).to(tl.int32)
    features = _entry(TABLE, GATE_FEATURES, layer, LAYERS).to(tl.int32)
    return rows, features, _entry(TABLE, GATE_HIDDEN, layer, LAYERS).to(tl.int32)


@triton.jit
def hidden_features(
    TABLE, statistic, hidden, LAYERS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """relu(FC1(statistic)), (rows, hidden)."""
    layer = tl.program_id(1)
    rows, features, width = _sizes(TABLE, layer, LAYERS)
    top, begin, exists = _tile(rows, width, M, N)
    if exists:
        statistic += _entry(TABLE, GATES, layer, LAYERS)
        hidden += _entry(TABLE, HIDDEN, layer, LAYERS)
        weight = _entry(TABLE, PARAMETERS, layer, LAYERS).to(statistic.dtype)
        bias = _entry(TABLE, PARAMETERS + 1, layer, LAYERS).to(statistic.dtype)
        tile, _ = _product(statistic, features, 1, weight, 1, features, rows, features, width, top, begin, M, N, K)
        row, column = top + tl.arange(0, M)[:, None], begin + tl.arange(0, N)[None, :]
        tile = tl.maximum(tile + tl.load(bias + column, mask=column < width, other=0), 0)
        tl.store(hidden + row * width + column, tile, mask=(row < rows) & (column < width))


@triton.jit
def gates(TABLE, hidden, gates, LAYERS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """sigmoid(FC2(hidden)), (rows, features)."""
    layer = tl.program_id(1)
    rows, features, width = _sizes(TABLE, layer, LAYERS)
    top, begin, exists = _tile(rows, features, M, N)
    if exists:
        hidden += _entry(TABLE, HIDDEN, layer, LAYERS)
        gates += _entry(TABLE, GATES, layer, LAYERS)
        weight = _entry(TABLE, PARAMETERS + 2, layer, LAYERS).to(hidden.dtype)
        bias = _entry(TABLE, PARAMETERS + 3, layer, LAYERS).to(hidden.dtype)
        tile, _ = _product(hidden, width, 1, weight, 1, width, rows, width, features, top, begin, M, N, K)
        row, column = top + tl.arange(0, M)[:, None], begin + tl.arange(0, N)[None, :]
        tile = 1 / (1 + tl.exp(-(tile + tl.load(bias + column, mask=column < features, other=0))))
        tl.store(gates + row * features + column, tile, mask=(row < rows) & (column < features))


@triton.jit
def hidden_gradient(
    TABLE, hidden, gates_gradient, gradient, LAYERS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """That of FC1's output, (rows, hidden)."""
    layer = tl.program_id(1)
    rows, features, width = _sizes(TABLE, layer, LAYERS)
    top, begin, exists = _tile(rows, width, M, N)
    if exists and _entry(TABLE, EXCITED, layer, LAYERS) != 0:
        hidden += _entry(TABLE, HIDDEN, layer, LAYERS)
        gradient += _entry(TABLE, HIDDEN, layer, LAYERS)
        gates_gradient += _entry(TABLE, GATES, layer, LAYERS)
        weight = _entry(TABLE, PARAMETERS + 2, layer, LAYERS).to(hidden.dtype)
        tile, _ = _product(gates_gradient, features, 1, weight, width, 1, rows, features, width, top, begin, M, N, K)
        row, column = top + tl.arange(0, M)[:, None], begin + tl.arange(0, N)[None, :]
        inside = (row < rows) & (column < width)
        was_positive = tl.load(hidden + row * width + column, mask=inside, other=0) > 0
        tl.store(gradient + row * width + column, tl.where(was_positive, tile, 0), mask=inside)


@triton.jit
def statistic_gradient(
    TABLE, hidden_gradient, gradient, LAYERS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """That of what FC1 is given, (rows, features)."""
    layer = tl.program_id(1)
    rows, features, width = _sizes(TABLE, layer, LAYERS)
    top, begin, exists = _tile(rows, features, M, N)
    if exists and _entry(TABLE, EXCITED, layer, LAYERS) != 0:
        hidden_gradient += _entry(TABLE, HIDDEN, layer, LAYERS)
        gradient += _entry(TABLE, GATES, layer, LAYERS)
        weight = _entry(TABLE, PARAMETERS, layer, LAYERS).to(gradient.dtype)
        tile, _ = _product(hidden_gradient, width, 1, weight, features, 1, rows, width, features, top, begin, M, N, K)
        row, column = top + tl.arange(0, M)[:, None], begin + tl.arange(0, N)[None, :]
        tl.store(gradient + row * features + column, tile, mask=(row < rows) & (column < features))


@triton.jit
def layer_gradients(
    TABLE, output_gradient, input, INDEX: tl.constexpr,
    LAYERS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Those of the weight and the bias of FC1 (INDEX 0) or FC2 (INDEX 2), from its input and its output's gradient."""
    layer = tl.program_id(1)
    rows, features, width = _sizes(TABLE, layer, LAYERS)
    if INDEX == 0:
        outputs, inputs, from_outputs, from_inputs = width, features, HIDDEN, GATES
    else:
        outputs, inputs, from_outputs, from_inputs = features, width, GATES, HIDDEN
    top, begin, exists = _tile(outputs, inputs, M, N)
    if exists and _entry(TABLE, EXCITED, layer, LAYERS) != 0:
        output_gradient += _entry(TABLE, from_outputs, layer, LAYERS)
        input += _entry(TABLE, from_inputs, layer, LAYERS)
        weight = _entry(TABLE, GRADIENTS + INDEX, layer, LAYERS).to(input.dtype)
        bias = _entry(TABLE, GRADIENTS + INDEX + 1, layer, LAYERS).to(input.dtype)
        tile, sums = _product(output_gradient, 1, outputs, input, inputs, 1, outputs, rows, inputs, top, begin, M, N, K)
        row, column = top + tl.arange(0, M), begin + tl.arange(0, N)
        inside = (row[:, None] < outputs) & (column[None, :] < inputs)
        tl.store(weight + row[:, None] * inputs + column[None, :], tile, mask=inside)
        tl.store(bias + row, sums, mask=(row < outputs) & (begin == 0))
