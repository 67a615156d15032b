"""Triton kernels that excite the weights of many layers at once; gpu.py says in which order they run.

What takes a GPU's time here is memory and launches: so a kernel works on all layers, whose tensors it finds by their
addresses, and both passes together read or write the weights nine times. Each program has one filter, or one tile of a
matrix product. With V the gated weight, MA the map's pole and G the gradient of the excited weight:

    forward    statistics, relative       mean and deviation of each filter, and the statistic that drives the gates
               hidden_features, gates     the gates' two layers
               largest, excited           max |V| of each layer; map(V)
    backward   sums                       of a filter's gradient, and the gradient of the gates' second layer's output
               hidden_gradient, statistic_gradient, layer_gradients, relative_gradient
               raw_gradient               that of the raw weight, in place of G

A filter's elements lie side by side, in either memory layout; the layouts differ in where an input channel's are.
Importing this file needs Triton, which PyTorch brings for Linux. With TRITON_INTERPRET=1 a CPU runs the kernels.
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
GATE_ROWS = tl.constexpr(7)  # the layers of the gate see so many rows: 1 of the channel gate, one a filter of the other
GATE_FEATURES = tl.constexpr(8)  # of so many numbers,
GATE_HIDDEN = tl.constexpr(9)  # which they turn into so many
GATES = tl.constexpr(10)  # place of the layer's first gate among all layers'
HIDDEN = tl.constexpr(11)  # place of its first hidden feature
PARAMETERS = tl.constexpr(12)  # addresses of weight 1, bias 1, weight 2, bias 2
GRADIENTS = tl.constexpr(16)  # addresses of their gradients
ROWS = 20

NO_GATE, CHANNEL, LOCATION = (tl.constexpr(kind) for kind in range(3))


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
def _pole(limits, layer, MARGIN: tl.constexpr):
    """MA; of a layer of zeros, whose map is zero at any pole, 1."""
    limit = tl.load(limits + layer) * MARGIN
    return tl.where(limit > 0, limit, 1)


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
def relative_gradient(
    TABLE, statistic, size, gradient, LAYERS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
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
        weight = tl.load(raw + element, mask=inside, other=0)
        if STANDARDIZED:
            weight = (weight - tl.load(mean + filter)) * tl.load(scale + filter)
        if GATE != NO_GATE:
            weight *= _gains(gates, TABLE, layer, place, element, inside, GATE, LAYERS)
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
        weight = tl.load(raw + element, mask=inside, other=0)
        if STANDARDIZED:
            weight = (weight - tl.load(mean + filter)) * tl.load(scale + filter)
        if GATE != NO_GATE:
            weight *= _gains(gates, TABLE, layer, place, element, inside, GATE, LAYERS)
        if MAPPED:
            pole = _pole(limits, layer, MARGIN)
            ratio = tl.where(inside, weight / pole, 0)
            # atanh q = log(1 + x) / 2 with x = 2 q / (1 - q); the factor mends the rounding of 1 + x (Kahan).
            x = 2 * ratio / (1 - ratio)
            near = 1 + x
            log = tl.where(near == 1, x, tl.log(near) * x / tl.where(near == 1, 1, near - 1))
            weight = pole * 0.5 * log
        tl.store(result + element, weight, mask=inside)


@triton.jit
def _slope(standard, gain, upstream, pole, MAPPED: tl.constexpr):
    """dL/dV: the map's df/dV is 1 / (1 - (V / MA)^2)."""
    if MAPPED:
        ratio = standard * gain / pole
        upstream /= 1 - ratio * ratio
    return upstream


@triton.jit
def sums(
    TABLE, mean, scale, gates, limits, totals, gradient, STANDARDIZED: tl.constexpr, GATE: tl.constexpr,
    MAPPED: tl.constexpr, MARGIN: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a filter, with Z the weight as it is gated and a the gates: the sums of a dL/dV and of a dL/dV Z.

    They go to the two rows of ``totals``; to ``gradient`` goes that of what the sigmoid of the gates is taken of, which
    is a (1 - a) times the sum of dL/dV Z over all that has the gate.
    """
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
    center, factor, pole, gate = 0.0, 1.0, 1.0, 1.0
    if STANDARDIZED:
        center, factor = tl.load(mean + filter), tl.load(scale + filter)
    if MAPPED:
        pole = _pole(limits, layer, MARGIN)
    if GATE != NO_GATE:
        gates += _entry(TABLE, GATES, layer, LAYERS)
        gradient += _entry(TABLE, GATES, layer, LAYERS)
    if GATE != LOCATION:  # the order of the elements doesn't matter
        inputs, locations, input_stride = inputs * locations, 1, 1
    if GATE == CHANNEL:
        gate = tl.load(gates + place)
    total = tl.zeros((BLOCK,), mean.dtype.element_ty)
    along = tl.zeros((BLOCK,), mean.dtype.element_ty)
    for start in range(0, inputs, BLOCK):
        input = start + tl.arange(0, BLOCK)
        inside = input < inputs
        gains = gate
        if GATE == LOCATION:
            gains = tl.load(gates + place * inputs + input, mask=inside, other=0)
        slopes = tl.zeros((BLOCK,), mean.dtype.element_ty)
        dots = tl.zeros((BLOCK,), mean.dtype.element_ty)
        for location in range(locations):
            element = input * input_stride + location * location_stride
            standard = tl.load(raw + element, mask=inside, other=0)
            standard = tl.where(inside, (standard - center) * factor, 0)
            slope = _slope(standard, gains, tl.load(upstream + element, mask=inside, other=0), pole, MAPPED)
            slopes += slope
            dots += slope * standard
        total += slopes * gains
        along += dots * gains
        if GATE == LOCATION:
            tl.store(gradient + place * inputs + input, dots * gains * (1 - gains), mask=inside)
    tl.store(totals + filter, tl.sum(total, 0))
    tl.store(totals + tl.num_programs(0) + filter, tl.sum(along, 0))
    if GATE == CHANNEL:
        tl.store(gradient + place, tl.sum(along, 0) * (1 - gate))


@triton.jit
def raw_gradient(
    TABLE, mean, scale, gates, limits, statistic, statistic_gradient, totals, STANDARDIZED: tl.constexpr,
    GATE: tl.constexpr, MAPPED: tl.constexpr, MARGIN: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr,
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
    inputs = _entry(TABLE, INPUTS, layer, LAYERS).to(tl.int32)
    locations = _entry(TABLE, LOCATIONS, layer, LAYERS).to(tl.int32)
    input_stride = _entry(TABLE, INPUT_STRIDE, layer, LAYERS).to(tl.int32)
    center, factor, average, along, pole = 0.0, 1.0, 0.0, 0.0, 1.0
    if GATE != NO_GATE:
        statistic += _entry(TABLE, GATES, layer, LAYERS)
        statistic_gradient += _entry(TABLE, GATES, layer, LAYERS)
    if STANDARDIZED:
        center, factor = tl.load(mean + filter), tl.load(scale + filter)
        average, along = tl.load(totals + filter), tl.load(totals + tl.num_programs(0) + filter)
        if GATE == LOCATION:  # whose statistic is a mean of Z
            through = tl.zeros((BLOCK,), mean.dtype.element_ty)
            dot = tl.zeros((BLOCK,), mean.dtype.element_ty)
            for start in range(0, inputs, BLOCK):
                input = start + tl.arange(0, BLOCK)
                slope = tl.load(statistic_gradient + place * inputs + input, mask=input < inputs, other=0)
                through += slope
                dot += slope * tl.load(statistic + place * inputs + input, mask=input < inputs, other=0)
            average += tl.sum(through, 0)
            along += tl.sum(dot, 0)
        average /= count
        along *= tl.load(scale + tl.num_programs(0) + filter)
    if MAPPED:
        pole = _pole(limits, layer, MARGIN)
    for start in range(0, count, BLOCK):
        element = start + tl.arange(0, BLOCK)
        inside = element < count
        weight = tl.load(raw + element, mask=inside, other=0)
        standard = tl.where(inside, (weight - center) * factor, 0)
        slope = tl.load(upstream + element, mask=inside, other=0)
        if GATE == NO_GATE:
            slope = _slope(standard, 1.0, slope, pole, MAPPED)
        else:
            gain = _gains(gates, TABLE, layer, place, element, inside, GATE, LAYERS)
            slope = _slope(standard, gain, slope, pole, MAPPED) * gain
        if GATE == LOCATION:
            input = element // input_stride % inputs
            slope += tl.load(statistic_gradient + place * inputs + input, mask=inside, other=0) / locations
        if STANDARDIZED:
            slope = (slope - average) * factor - standard * along
        if GATE == CHANNEL:  # whose statistic is of the magnitudes
            sign = tl.where(weight > 0, 1.0, tl.where(weight < 0, -1.0, 0.0))
            slope += sign * tl.load(statistic_gradient + place)
        tl.store(upstream + element, slope, mask=inside)


@triton.jit
def _product(
    left, left_row, left_inner, right, right_inner, right_column, rows, inner, columns, top, begin,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile at (top, begin) of the product of two matrices, and the sums of the first one's rows there."""
    row, column = top + tl.arange(0, M), begin + tl.arange(0, N)
    result = tl.zeros((M, N), left.dtype.element_ty)
    parts = tl.zeros((K, N), left.dtype.element_ty)
    totals = tl.zeros((M, K), left.dtype.element_ty)
    for start in range(0, inner, K):
        k = start + tl.arange(0, K)
        a = left + row[:, None] * left_row + k[None, :] * left_inner
        b = right + k[:, None] * right_inner + column[None, :] * right_column
        a = tl.load(a, mask=(row[:, None] < rows) & (k[None, :] < inner), other=0)
        b = tl.load(b, mask=(k[:, None] < inner) & (column[None, :] < columns), other=0)
        totals += a
        if K == 1:
            result += a * b
        elif M == 1:
            parts += tl.trans(a) * b
        else:
            result += tl.dot(a, b, input_precision=PRECISION, out_dtype=left.dtype.element_ty)
    if M == 1:
        result += tl.sum(parts, 0)[None, :]
    return result, tl.sum(totals, 1)


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
    TABLE, statistic, hidden, LAYERS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
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
        tile, _ = _product(
            statistic, features, 1, weight, 1, features, rows, features, width, top, begin, M, N, K, PRECISION
        )  # fmt: skip
        row, column = top + tl.arange(0, M)[:, None], begin + tl.arange(0, N)[None, :]
        tile = tl.maximum(tile + tl.load(bias + column, mask=column < width, other=0), 0)
        tl.store(hidden + row * width + column, tile, mask=(row < rows) & (column < width))


@triton.jit
def gates(
    TABLE, hidden, gates, LAYERS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """sigmoid(FC2(hidden)), (rows, features)."""
    layer = tl.program_id(1)
    rows, features, width = _sizes(TABLE, layer, LAYERS)
    top, begin, exists = _tile(rows, features, M, N)
    if exists:
        hidden += _entry(TABLE, HIDDEN, layer, LAYERS)
        gates += _entry(TABLE, GATES, layer, LAYERS)
        weight = _entry(TABLE, PARAMETERS + 2, layer, LAYERS).to(hidden.dtype)
        bias = _entry(TABLE, PARAMETERS + 3, layer, LAYERS).to(hidden.dtype)
        tile, _ = _product(hidden, width, 1, weight, 1, width, rows, width, features, top, begin, M, N, K, PRECISION)
        row, column = top + tl.arange(0, M)[:, None], begin + tl.arange(0, N)[None, :]
        tile = 1 / (1 + tl.exp(-(tile + tl.load(bias + column, mask=column < features, other=0))))
        tl.store(gates + row * features + column, tile, mask=(row < rows) & (column < features))


@triton.jit
def hidden_gradient(
    TABLE, hidden, gates_gradient, gradient, LAYERS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
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
        tile, _ = _product(
            gates_gradient, features, 1, weight, width, 1, rows, features, width, top, begin, M, N, K, PRECISION
        )  # fmt: skip
        row, column = top + tl.arange(0, M)[:, None], begin + tl.arange(0, N)[None, :]
        inside = (row < rows) & (column < width)
        was_positive = tl.load(hidden + row * width + column, mask=inside, other=0) > 0
        tl.store(gradient + row * width + column, tl.where(was_positive, tile, 0), mask=inside)


@triton.jit
def statistic_gradient(
    TABLE, hidden_gradient, gradient, LAYERS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """That of what FC1 is given, (rows, features)."""
    layer = tl.program_id(1)
    rows, features, width = _sizes(TABLE, layer, LAYERS)
    top, begin, exists = _tile(rows, features, M, N)
    if exists and _entry(TABLE, EXCITED, layer, LAYERS) != 0:
        hidden_gradient += _entry(TABLE, HIDDEN, layer, LAYERS)
        gradient += _entry(TABLE, GATES, layer, LAYERS)
        weight = _entry(TABLE, PARAMETERS, layer, LAYERS).to(gradient.dtype)
        tile, _ = _product(
            hidden_gradient, width, 1, weight, features, 1, rows, width, features, top, begin, M, N, K, PRECISION
        )  # fmt: skip
        row, column = top + tl.arange(0, M)[:, None], begin + tl.arange(0, N)[None, :]
        tl.store(gradient + row * features + column, tile, mask=(row < rows) & (column < features))


@triton.jit
def layer_gradients(
    TABLE, output_gradient, input, INDEX: tl.constexpr,
    LAYERS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
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
        tile, sums = _product(
            output_gradient, 1, outputs, input, inputs, 1, outputs, rows, inputs, top, begin, M, N, K, PRECISION
        )  # fmt: skip
        row, column = top + tl.arange(0, M), begin + tl.arange(0, N)
        inside = (row[:, None] < outputs) & (column[None, :] < inputs)
        tl.store(weight + row[:, None] * inputs + column[None, :], tile, mask=inside)
        tl.store(bias + row, sums, mask=(row < outputs) & (begin == 0))
