import naive
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from naive import philox as ref_philox

from sim import streams
from sim.kernels import kernel

WORD = st.integers(0, 2**32 - 1)


@kernel
def _comp_philox(c, k):
    return streams.philox(c[0], c[1], c[2], c[3], k[0], k[1])


@kernel
def _map_exponential(words, out):
    for i in range(words.size):
        out[i] = streams.exponential(words[i])


@kernel
def _map_normal(a, b, out):
    for i in range(a.size):
        out[0, i], out[1, i] = streams.normal_pair(a[i], b[i])


@kernel
def _map_exp(x, out):
    for i in range(x.size):
        out[i] = streams.exp32(x[i])


@kernel
def _at(key, purpose, sequence, row, index):
    return streams.word_at(index, row, sequence, purpose, key[0], key[1])


def test_philox_gives_the_published_known_answer():
    """Random123's kat_vectors, philox4x32 with 7 rounds, all zeros."""
    known = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert ref_philox([0] * 4, [0] * 2, 7) == known
    assert [int(w) for w in _comp_philox(np.zeros(4, np.uint64), np.zeros(2, np.uint64))] == known


@given(st.lists(WORD, min_size=4, max_size=4), st.lists(WORD, min_size=2, max_size=2))
def test_philox_equals_reference(counter, key):
    comp = _comp_philox(np.array(counter, np.uint64), np.array(key, np.uint64))
    assert [int(w) for w in comp] == ref_philox(counter, key, 7)


def test_a_word_is_the_same_however_it_is_reached():
    key = streams.stream_key(7, "test")
    table = streams.words(key, streams.TOKEN, 5, (6, 11))
    later = streams.words(key, streams.TOKEN, 5, (3, 4), rows=2)
    some = streams.words(key, streams.TOKEN, 5, (2, 4), rows=np.array([4, 1]))
    np.testing.assert_array_equal(later, table[2:5, :4])
    np.testing.assert_array_equal(some, table[[4, 1], :4])
    for row in range(6):
        for index in range(11):
            assert _at(key, streams.TOKEN, 5, row, index) == table[row, index]


def test_seed_subject_purpose_and_sequence_change_the_words():
    variants = {
        tuple(streams.words(streams.stream_key(seed, what), purpose, sequence, (1, 4))[0].tolist())
        for seed in (0, 1)
        for what in ("a", "b")
        for purpose in (streams.TOKEN, streams.REQUEST)
        for sequence in (0, 1)
    }
    assert len(variants) == 16


def test_exponential_is_accurate_over_its_whole_range():
    edges = [0, 1, 2, 3, 2**30 - 1, 2**30, 2**30 + 1, 2**31, 2**32 - 2, 2**32 - 1]
    words = np.concatenate([edges, np.random.default_rng(1).integers(0, 2**32, 200_000)]).astype(np.uint32)
    comp = np.empty(len(words), np.float32)
    _map_exponential(words, comp)
    ref = -np.log1p(-(words // 2 + 0.5) * 2.0**-31)
    np.testing.assert_allclose(comp, ref, rtol=4e-7)


def test_polynomial_of_the_logarithm_is_the_chebyshev_interpolant():
    interpolant = np.polynomial.Chebyshev.interpolate(lambda f: np.log1p(f) / f, 9, domain=[-0.2500001, 0.5])
    ref = interpolant.convert(kind=np.polynomial.Polynomial).coef
    np.testing.assert_allclose(streams.LOG1P, ref, rtol=1e-6)


def test_normals_and_exp_are_accurate():
    a, b = np.random.default_rng(2).integers(0, 2**32, (2, 100_000)).astype(np.uint32)
    comp = np.empty((2, len(a)), np.float32)
    _map_normal(a, b, comp)
    radius, angle = np.sqrt(-2 * np.log1p(-(a // 2 + 0.5) * 2.0**-31)), 2 * np.pi * b * 2.0**-32
    np.testing.assert_allclose(comp, [radius * np.cos(angle), radius * np.sin(angle)], atol=2e-6)
    x = np.linspace(-20, 20, 100_001).astype(np.float32)
    grown = np.empty_like(x)
    _map_exp(x, grown)
    np.testing.assert_allclose(grown, np.exp(x.astype(float)), rtol=3e-7)


def test_transforms_are_those_of_the_plain_reference_bit_for_bit():
    """Every float operation is done alone in the reference, so that these bits are those of any machine."""
    a, b = np.random.default_rng(3).integers(0, 2**32, (2, 2000)).astype(np.uint32)
    times, normals, grown = (
        np.empty(len(a), np.float32),
        np.empty((2, len(a)), np.float32),
        np.empty(len(a), np.float32),
    )
    _map_exponential(a, times)
    _map_normal(a, b, normals)
    _map_exp(normals[0], grown)
    assert times.tolist() == [naive.exponential(word) for word in a]
    assert normals.T.tolist() == [list(naive.normal_pair(*words)) for words in zip(a, b, strict=True)]
    assert grown.tolist() == [naive.exp32(x) for x in normals[0]]


def test_uniforms_have_the_right_moments():
    """False-alarm rate below 1e-5: five standard errors, fixed seed."""
    x = streams.uniforms(streams.stream_key(3, "moments"), streams.POPULARITY, 0, (1000, 200))
    assert abs(x.mean() - 0.5) < 5 * np.sqrt(1 / 12 / x.size)
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 5 / np.sqrt(x.size)
