"""Counter-based random streams: any word of any stream, addressed and not advanced.

A stream is keyed by (seed, what is sampled); a word in it by (purpose, trial or draw, token or row, index). No state is
carried, so the same words come out on any number of threads, processes and machines, in any order.

The generator is Philox4x32 with 7 rounds, the fewest that pass BigCrush (Salmon, Moraes, Dror, Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011, table 2). The transforms to exponentials and normals are float32 polynomials
without calls into a maths library: they vectorise, and give the same bits on every machine.

A multiply-add is written as `fma`, which rounds once. A processor has it as one instruction, and without one the maths
library works it out to the same bits (IEEE 754-2008), so it is both faster and no less portable. What must never happen is
that a compiler fuses on some machines what is written as two operations: numba does not, and since every product that is
added to something is an `fma` here, nothing is left to fuse.
"""

import hashlib
import math

import numpy as np
from numba import types
from numba.extending import intrinsic

from sim.kernels import kernel

# What a word is drawn for: the last counter word, so that no two purposes share a word.
POPULARITY, REQUEST, TOKEN, PERMUTATION, REPLAY, GROUP, CONTEXT, LOCAL, STRENGTH = map(np.uint64, range(9))

_MUL_0, _MUL_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 7


def stream_key(seed: int, what: str) -> np.ndarray:
    """Key of the stream of `what` under `seed`: uint64 [2], each below 2**32."""
    digest = hashlib.sha256(f"{seed}|{what}".encode()).digest()
    return np.frombuffer(digest[:8], dtype="<u4").astype(np.uint64)


@kernel(forceinline=True)
def philox(c0, c1, c2, c3, k0, k1):
    """Four random 32-bit words (as uint64) of the counter (c0, c1, c2, c3) under the key (k0, k1)."""
    for _ in range(_ROUNDS):  # upper halves are left dirty: products take the lower ones, which is one instruction
        p0 = _MUL_0 * (c0 & _LOW)
        p1 = _MUL_1 * (c2 & _LOW)
        c0 = (p1 >> _32) ^ c1 ^ k0
        c1 = p1
        c2 = (p0 >> _32) ^ c3 ^ k1
        c3 = p0
        k0 = (k0 + _WEYL_0) & _LOW
        k1 = (k1 + _WEYL_1) & _LOW
    return c0 & _LOW, c1 & _LOW, c2 & _LOW, c3 & _LOW


@kernel
def word_at(index, row, sequence, purpose, k0, k1):
    """One 32-bit word of a stream, addressed directly: word `index` of row `row` of `sequence`."""
    index = np.uint64(index)
    a, b, c, d = philox(index >> np.uint64(2), np.uint64(row), np.uint64(sequence), purpose, k0, k1)
    lane = index & np.uint64(3)
    if lane < 2:
        return np.uint32(a if lane == 0 else b)
    return np.uint32(c if lane == 2 else d)


@kernel(forceinline=True)
def fill_block(key, purpose, sequence, block, first_row, n_rows, out, at, stride):
    """Words 4 * block .. 4 * block + 3 of `n_rows` consecutive rows, each word's in a run: out uint32, flat; the first run
    begins at `at`, the others `stride` further on each.
    """
    k0, k1 = key[0], key[1]  # read once: a store to `out` might alias them, and the loop would not vectorise
    for i in range(n_rows):
        a, b, c, d = philox(np.uint64(block), np.uint64(first_row + i), np.uint64(sequence), purpose, k0, k1)
        here = np.uint64(at) + np.uint64(i)
        out[here] = np.uint32(a)
        out[here + np.uint64(stride)] = np.uint32(b)
        out[here + np.uint64(2 * stride)] = np.uint32(c)
        out[here + np.uint64(3 * stride)] = np.uint32(d)


@kernel
def fill_words(key, purpose, sequence, rows, out):
    """Words of some rows, int64: out[j, i] = word j of row rows[i]; out uint32 [4 * blocks, >= len(rows)]."""
    k0, k1 = key[0], key[1]
    for block in range(out.shape[0] // 4):
        for i in range(rows.size):
            words = philox(np.uint64(block), np.uint64(rows[i]), np.uint64(sequence), purpose, k0, k1)
            for j in range(4):
                out[4 * block + j, i] = words[j]


def _fill_rows(
    key: np.ndarray, purpose: np.uint64, sequence: int, shape: tuple[int, int], rows: int | np.ndarray
) -> np.ndarray:
    """Words uint32 [words, rows], in whole blocks, of consecutive rows from `rows` on, or of these rows."""
    n_rows, n_words = shape
    out = np.empty((-(-n_words // 4) * 4, n_rows), np.uint32)
    fill_words(key, purpose, sequence, rows if isinstance(rows, np.ndarray) else rows + np.arange(n_rows), out)
    return out


def words(
    key: np.ndarray, purpose: np.uint64, sequence: int, shape: tuple[int, int], rows: int | np.ndarray = 0
) -> np.ndarray:
    """Random words of (`purpose`, `sequence`), uint32 `shape` [rows, words]: of consecutive rows from `rows` on, or of the
    rows int64 [rows] given.
    """
    return np.ascontiguousarray(_fill_rows(key, purpose, sequence, shape, rows)[: shape[1]].T)


def uniforms(
    key: np.ndarray, purpose: np.uint64, sequence: int, shape: tuple[int, int], rows: int | np.ndarray = 0
) -> np.ndarray:
    """Uniforms in (0, 1), float64 `shape` [rows, words], from `words`."""
    return (words(key, purpose, sequence, shape, rows) + 0.5) * 2.0**-32


@intrinsic
def fma(typing_context, a, b, c):
    """a * b + c, float32, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


# log1p(f) / f on [-1/4, 1/2]: the interpolant at 10 Chebyshev nodes, relative error 5e-9 before rounding to float32.
# Written out, not computed at import, so that every machine has the same bits; a test computes them again.
LOG1P = (
    1.0,
    -0.5,
    0.3333350121974945,
    -0.24999916553497314,
    0.19989043474197388,
    -0.16650031507015228,
    0.1450427770614624,
    -0.13161523640155792,
    0.1032947301864624,
    -0.043615926057100296,
)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8, _L9 = (np.float32(c) for c in LOG1P)
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1), np.float32(0)
_SCALE, _HALF_SCALE = np.float32(2.0**-31), np.float32(2.0**-32)
_LN2 = np.float32(np.log(2))
_1, _QUARTER, _MOST = np.uint32(1), np.int32(1 << 29), np.int32(2**31 - 1)
_THREE_QUARTERS_BITS, _MANTISSA_BITS = np.int32(0x3F400000), np.int32(23)


@kernel(forceinline=True)
def exponential(word):
    """Standard exponential, float32, of a uint32 word, to 3e-7 relative: -log1p(-x), x = (word // 2 + 1/2) / 2**31.

    (31 bits, since processors turn signed numbers into floats at a stroke, and unsigned ones only from AVX-512 on.) Below
    x = 1/4 the series takes x itself, so that the small times (the winners) keep their relative accuracy; above, it is
    log(1 - x) with 1 - x = m * 2**e, m in [3/4, 3/2).
    """
    half = np.int32(word >> _1)
    small = half < _QUARTER
    near_0 = half if small else np.int32(half ^ _MOST)
    u = np.float32(fma(np.float32(near_0), _SCALE, _HALF_SCALE))  # x, or 1 - x
    bits = u.view(np.int32)
    exponent = np.int32(np.int32(bits - _THREE_QUARTERS_BITS) >> _MANTISSA_BITS)  # numba would widen to 64 bits
    mantissa = np.int32(bits - np.int32(exponent << _MANTISSA_BITS)).view(np.float32)
    f = -u if small else mantissa - _ONE
    e = _ZERO if small else np.float32(exponent)
    p = fma(_L9, f, _L8)
    p = fma(p, f, _L7)
    p = fma(p, f, _L6)
    p = fma(p, f, _L5)
    p = fma(p, f, _L4)
    p = fma(p, f, _L3)
    p = fma(p, f, _L2)
    p = fma(p, f, _L1)
    p = fma(p, f, _L0)
    return -fma(e, _LN2, p * f)


_TURN = np.float32(2 * np.pi * 2.0**-32)
_S1, _S2, _S3, _S4 = (np.float32(c) for c in (-1 / 6, 1 / 120, -1 / 5040, 1 / 362880))
_C1, _C2, _C3, _C4 = (np.float32(c) for c in (-1 / 2, 1 / 24, -1 / 720, 1 / 40320))
_EIGHTH, _30 = np.uint32(1 << 29), np.uint32(30)


@kernel(forceinline=True)
def normal_pair(word_radius, word_angle):
    """Two independent standard normals, float32, of two uint32 words (Box and Muller, 1958)."""
    radius = math.sqrt(np.float32(2) * exponential(word_radius))
    quadrant = np.uint32(np.uint32(word_angle + _EIGHTH) >> _30)
    angle = np.float32(np.int32(np.uint32(word_angle - np.uint32(quadrant << _30)))) * _TURN
    q = angle * angle
    sine = fma(angle * q, fma(fma(fma(_S4, q, _S3), q, _S2), q, _S1), angle)
    cosine = fma(fma(fma(fma(_C4, q, _C3), q, _C2), q, _C1), q, _ONE)
    swap = (quadrant & np.uint32(1)) == 1
    u = sine if swap else cosine
    v = cosine if swap else sine
    first = -u if quadrant == 1 or quadrant == 2 else u
    second = -v if quadrant >= 2 else v
    return radius * first, radius * second


_LOG2E = np.float32(1 / np.log(2))
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_E2, _E3, _E4, _E5, _E6, _E7 = (np.float32(c) for c in (1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040))


@kernel(forceinline=True)
def exp32(x):
    """exp(x), float32, for |x| < 80, to 2e-7 relative."""
    nearest = fma(x, _LOG2E, _HALF)
    k = np.float32(np.int32(nearest))
    k = k - _ONE if k > nearest else k  # its floor
    r = fma(-k, _LN2_LOW, fma(-k, _LN2_HIGH, x))
    p = fma(_E7, r, _E6)
    p = fma(p, r, _E5)
    p = fma(p, r, _E4)
    p = fma(p, r, _E3)
    p = fma(p, r, _E2)
    p = fma(p, r, _ONE)
    p = fma(p, r, _ONE)
    power = np.int32((np.int32(k) + np.int32(127)) << _MANTISSA_BITS).view(np.float32)
    return p * power


@kernel
def fill_normals(words, out):
    """Standard normals of words uint32 [>= 2 pairs, n], a pair of words for each pair: out float32 [n, <= 2 pairs]."""
    n, n_out = out.shape
    pair = np.empty((2, n), np.float32)
    for j in range(0, n_out, 2):
        for i in range(n):
            pair[0, i], pair[1, i] = normal_pair(words[j, i], words[j + 1, i])
        for k in range(min(2, n_out - j)):
            for i in range(n):
                out[i, j + k] = pair[k, i]


def normals(
    key: np.ndarray, purpose: np.uint64, sequence: int, shape: tuple[int, int], rows: int | np.ndarray = 0
) -> np.ndarray:
    """Standard normals, float32 `shape` [rows, numbers], from `words`; at most 6.7."""
    out = np.empty(shape, np.float32)
    fill_normals(_fill_rows(key, purpose, sequence, shape, rows), out)
    return out
