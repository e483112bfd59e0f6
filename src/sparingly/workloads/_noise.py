"""How people misspell words: a generator of synthetic typing errors over letter codes (1-26 for a-z).

The kinds of error are those of Damerau (1964) for slips of the fingers and of Kukich (1992, section 2) for the rest:
letters left out, swapped, replaced (a neighbouring key, another vowel), doubled or inserted, doubles made single, and
spellings that sound alike. All rates are in :class:`Rates`, all spellings in :data:`SOUNDS_LIKE`. They are general
knowledge about typing and English spelling; none was fitted on the misspellings that a model is tested on.

F. J. Damerau, "A technique for computer detection and correction of spelling errors", CACM 7(3), 1964.
K. Kukich, "Techniques for automatically correcting words in text", ACM Computing Surveys 24(4), 1992.
G. Marsaglia, "Xorshift RNGs", Journal of Statistical Software 8(14), 2003 (the random numbers).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparingly.ops._numba import inlined, kernel

LETTERS_WIDTH = 32
"""Columns of an array of letter codes; longer words are cut."""

_LONGEST = 29  # letters of a misspelt word: a change that would make it longer is not made


class Rates(NamedTuple):
    """Every probability of the generator.

    ``delete`` to ``undouble`` are the kinds of one change; what they leave of 1 is a spelling from
    :data:`SOUNDS_LIKE`, which also replaces an ``undouble`` in a word without doubled letters. ``substitute_*`` and
    ``insert_*`` are conditional on their kind, and what they leave of 1 is any letter of the alphabet.
    """

    one_change: float = 0.75
    two_changes: float = 0.20  # the rest: three
    delete: float = 0.28
    transpose: float = 0.17
    substitute: float = 0.17
    insert: float = 0.15
    undouble: float = 0.06
    keep_first: float = 0.70  # a change that falls on the first letter is drawn anew this often
    substitute_vowel: float = 0.75  # of a vowel, by a vowel
    substitute_neighbour: float = 0.60  # of a consonant, by a neighbouring key
    insert_double: float = 0.40
    insert_neighbour: float = 0.20
    insert_vowel: float = 0.20
    insert_nearby: float = 0.10  # a copy of a letter that stands at most two places away


# What is written -> what people write instead; of all that fit a word one is drawn, longer ones in proportion to
# their length. One line per left side; "-" stands for nothing.
SOUNDS_LIKE = """
a ai | ai a | able ible | al el | ally ly | ance ence | ant ent | ar er | ary ery | ate ite | au o | aw au | bt t
c k s ch | cc c | ch tch sh c | ck k c | de di | dg g | di de | e - | ea e ee | ed d | ee ea | ei ie | eing ing | el le
en in | ence ance | ent ant | eo e | er or ar re | ery ary | eu u | ey y | f ph | ful full | full ful | g j gu
ge je | gh - | gu g | h - | i y | ia ai | ible able | ie ei | ies ys yes | im in | in en | ing eing | io oi | ir er
ise ize | ite ate | ity ty | ize ise | j g | k c | kn n | le el al | ly ally | m n | ment mant | mn m | n m | ness nes
o ou | oo u | or er | ory ary | ou o u | ous us ious | ious ous | per pre | ph f | pn n | pre per | pro por | ps s
qu kw | que ck | re er | rh r | s c z sc | sc s c | sh ch | sion tion | t th | tch ch | th t | tion sion cion toin ton
u oo | ue eu | uo ou | ur er | us ous | v w | w v | wh w | x xc | xc x | y i ey | z s
"""

_KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_VOWELS = np.array([1, 5, 9, 15, 21, 25], np.uint8)  # y last: it replaces a vowel but is not inserted as one


def letter_codes(text: str) -> list[int]:
    """a-z as 1-26."""
    return [ord(letter) - 96 for letter in text]


def _neighbours() -> tuple[np.ndarray, np.ndarray]:
    """Keys that touch, rows being shifted by half a key: uint8 codes [27, 8] of each key's, and int64 counts [27]."""
    place = {key: (row, column + 0.5 * row) for row, keys in enumerate(_KEY_ROWS) for column, key in enumerate(keys)}
    codes, counts = np.zeros((27, 8), np.uint8), np.zeros(27, np.int64)
    for key, (row, x) in place.items():
        near = [k for k, (r, c) in place.items() if k != key and abs(r - row) <= 1 and abs(c - x) <= 1]
        code = letter_codes(key)[0]
        codes[code, : len(near)] = letter_codes("".join(near))
        counts[code] = len(near)
    return codes, counts


def _spellings() -> tuple[np.ndarray, np.ndarray]:
    """SOUNDS_LIKE as codes, uint8 [pairs, 5] from and to: a letter count, then the letters."""
    pairs = []
    for line in SOUNDS_LIKE.replace("\n", " | ").split("|"):
        written, *others = line.split() or [""]
        pairs += [(written, "" if other == "-" else other) for other in others]
    table = np.zeros((2, len(pairs), 5), np.uint8)
    for number, pair in enumerate(pairs):
        for side, text in enumerate(pair):
            table[side, number, : len(text) + 1] = [len(text), *letter_codes(text)]
    return table[0], table[1]


_NEAR, _NUM_NEAR = _neighbours()
_FROM, _TO = _spellings()

# Numba turns uint64 combined with a signed number into float64, so every constant is a uint64 itself.
_GOLDEN, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_U7, _U11, _U13, _U17, _U27, _U30, _U31, _U32 = (np.uint64(n) for n in (7, 11, 13, 17, 27, 30, 31, 32))


@inlined
def _mix(value):
    """The finaliser of SplitMix64: near counters become unrelated numbers."""
    value += _GOLDEN
    value = (value ^ (value >> _U30)) * _MIX_1
    value = (value ^ (value >> _U27)) * _MIX_2
    return value ^ (value >> _U31)


@inlined
def seed_stream(state, seed, step, item):
    """Start the stream of one example, uint64 all: it does not depend on the batch around it."""
    state[0] = _mix(_mix(_mix(seed) ^ step) ^ item)
    if state[0] == 0:
        state[0] = _GOLDEN


@inlined
def _bits(state):
    """64 random bits (xorshift64)."""
    x = state[0]
    x ^= x << _U13
    x ^= x >> _U7
    x ^= x << _U17
    state[0] = x
    return x


@inlined
def below(state, bound):
    """Random integer in 0..bound-1, by the upper half of a product; the bias is under bound / 2**32."""
    return np.int64(((_bits(state) >> _U32) * np.uint64(bound)) >> _U32)


@inlined
def uniform(state):
    """Random float64 in [0, 1)."""
    return np.int64(_bits(state) >> _U11) * (1.0 / (1 << 53))


@inlined
def _place(state, bound, rates):
    """A position below ``bound``; the first one seldom, because people seldom get the first letter wrong."""
    place = below(state, bound)
    if place == 0 and uniform(state) < rates.keep_first:
        place = below(state, bound)
    return place


@inlined
def _remove(word, row, length, place):
    for j in range(place, length - 1):
        word[row, j] = word[row, j + 1]
    word[row, length - 1] = 0
    return length - 1


@inlined
def _transpose(word, row, length, state, rates):
    place = _place(state, length - 1, rates)
    for _ in range(4):  # Swapping two equal letters would change nothing.
        if word[row, place] != word[row, place + 1]:
            break
        place = below(state, length - 1)
    left = word[row, place]
    word[row, place] = word[row, place + 1]
    word[row, place + 1] = left


@inlined
def _substitute(word, row, length, state, rates):
    place = _place(state, length, rates)
    chance = uniform(state)
    old = word[row, place]
    vowel = False
    for code in _VOWELS:
        vowel = vowel or code == old
    if vowel and chance < rates.substitute_vowel:
        word[row, place] = _VOWELS[below(state, 6)]
    elif not vowel and chance < rates.substitute_neighbour:
        word[row, place] = _NEAR[old, below(state, _NUM_NEAR[old])]
    else:
        word[row, place] = 1 + below(state, 26)


@inlined
def _insert(word, row, length, state, rates):
    place = below(state, length + 1)
    chance = uniform(state)
    double = rates.insert_double
    neighbour = double + rates.insert_neighbour
    vowel = neighbour + rates.insert_vowel
    if chance < double:
        place = below(state, length)
        code = np.int64(word[row, place])
    elif chance < neighbour:
        old = word[row, min(place, length - 1)]
        code = np.int64(_NEAR[old, below(state, _NUM_NEAR[old])])
    elif chance < vowel:
        code = np.int64(_VOWELS[below(state, 5)])
    elif chance < vowel + rates.insert_nearby:
        code = np.int64(word[row, min(length - 1, max(0, place + 1 - below(state, 4)))])
    else:
        code = 1 + below(state, 26)
    for j in range(length, place, -1):
        word[row, j] = word[row, j - 1]
    word[row, place] = code
    return length + 1


@inlined
def _undouble(word, row, length, state):
    """Make one of the doubled letters single; the length as it was if there is none."""
    doubles = 0
    chosen = -1
    for j in range(length - 1):
        if word[row, j] == word[row, j + 1]:
            doubles += 1
            if below(state, doubles) == 0:
                chosen = j
    return length if chosen < 0 else _remove(word, row, length, chosen)


@inlined
def _fits(word, row, place, spelling):
    size, t = _FROM[spelling, 0], 0
    while t < size and word[row, place + t] == _FROM[spelling, 1 + t]:
        t += 1
    return t == size


@inlined
def _respell(word, row, length, state):
    """Write one part of the word as it might sound."""
    weight, spelling, place = 0, -1, 0
    for candidate in range(_FROM.shape[0]):
        size = np.int64(_FROM[candidate, 0])
        for j in range(length - size + 1):
            if _fits(word, row, j, candidate):
                weight += size
                if below(state, weight) < size:
                    spelling, place = candidate, j
    if spelling < 0:
        return length
    old, new = np.int64(_FROM[spelling, 0]), np.int64(_TO[spelling, 0])
    if not 2 <= length + new - old <= _LONGEST:
        return length
    if new > old:
        for j in range(length - 1, place + old - 1, -1):
            word[row, j + new - old] = word[row, j]
    else:
        for j in range(place + old, length):
            word[row, j + new - old] = word[row, j]
    for t in range(new):
        word[row, place + t] = _TO[spelling, 1 + t]
    for j in range(length + new - old, length):
        word[row, j] = 0
    return length + new - old


@kernel
def change(word, row, length, state, rates):
    """Make one error in ``word[row]`` (uint8 codes), in place; returns the new length."""
    kind = uniform(state)
    if kind < rates.delete:
        return _remove(word, row, length, _place(state, length, rates)) if length > 2 else length
    kind -= rates.delete
    if kind < rates.transpose:
        if length > 2:
            _transpose(word, row, length, state, rates)
        return length
    kind -= rates.transpose
    if kind < rates.substitute:
        _substitute(word, row, length, state, rates)
        return length
    kind -= rates.substitute
    if kind < rates.insert:
        return _insert(word, row, length, state, rates) if length < _LONGEST else length
    if kind - rates.insert < rates.undouble and length > 2:
        shorter = _undouble(word, row, length, state)
        if shorter < length:
            return shorter
    return _respell(word, row, length, state)


@kernel
def misspell(letters, lengths, classes, seed, step, rates, out, out_lengths):
    """Misspelt ``letters[classes[i]]`` into ``out[i]`` (uint8 [tokens, LETTERS_WIDTH]) and its length.

    An outcome equal to the word itself is drawn again, three times at most.
    """
    state = np.zeros(1, np.uint64)
    for i in range(classes.shape[0]):
        seed_stream(state, seed, step, np.uint64(2 * i + 1))
        source = classes[i]
        for _ in range(4):
            length = np.int64(lengths[source])
            for j in range(letters.shape[1]):  # Assigning the row would take seconds to compile.
                out[i, j] = letters[source, j]
            chance = uniform(state)
            changes = 1 if chance < rates.one_change else 2 if chance < rates.one_change + rates.two_changes else 3
            for _ in range(changes):
                length = change(out, i, length, state, rates)
            same = length == lengths[source]
            for j in range(length):
                same = same and out[i, j] == letters[source, j]
            if not same:
                break
        out_lengths[i] = length


@kernel
def draw_classes(cumulative, seed, step, classes):
    """Fill ``classes`` (int64 [tokens]) with classes of cumulative probability ``cumulative`` (float64, ends in 1)."""
    state = np.zeros(1, np.uint64)
    for i in range(classes.shape[0]):
        seed_stream(state, seed, step, np.uint64(2 * i))
        classes[i] = np.searchsorted(cumulative, uniform(state), side="right")
