"""States as things to be kept: what a file gives back goes on as if nothing had happened, and fits nowhere else."""

import doctest
import json
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from saccade.catalogue import mechanism, mechanisms
from saccade.contract import Dims
from saccade.hosts.lm import LM, Cache, LMConfig
from saccade.scan import Matrix, State, linear_attention, snapshot
from saccade.testing.ambient import seeded
from saccade.testing.budget import assert_close, same_bits
from saccade.testing.decode import decode
from saccade.testing.subject import randomise

DECODERS = [spec.id for spec in mechanisms() if mechanism(spec.id).can_step()]


def decoder(id, case=0):
    """A mechanism with parameters that are nothing special, and its inputs, both float64."""
    cls = mechanism(id)
    chosen = cls.cases()[case]
    with seeded(0):
        module = randomise(cls(chosen.dims, **chosen.params)).double().eval()
    return module, cls.inputs(chosen, torch.Generator().manual_seed(0))


def same(one, other):
    """The same classes, values and bits all through."""
    assert type(one) is type(other) or isinstance(other, torch.nn.Parameter)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert same_bits(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        [same(one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)):
        [same(a, b) for a, b in zip(one, other, strict=True)]
    elif hasattr(one, "__dict__"):
        same(vars(one), vars(other))
    else:
        assert one == other


@pytest.mark.parametrize("id", DECODERS)
def test_decoding_goes_on_from_a_file_as_if_uninterrupted(id, tmp_path):
    module, inputs = decoder(id)
    length = inputs[0].shape[-2]
    whole, _ = decode(module, inputs)
    for count in sorted({1, length // 2, length - 1}):
        _, state = decode(module, inputs, last=count)
        snapshot.save(tmp_path / "state.safetensors", state, mechanism=module)
        back = snapshot.load(tmp_path / "state.safetensors", mechanism=module, like=state)
        same(back, state)
        assert snapshot.nbytes(back) == snapshot.nbytes(state) > 0
        rest, _ = decode(module, inputs, back, first=count)
        # The bits of the state are the same, its strides need not be, and sums may then run in another order.
        assert_close(rest, whole[..., count:, :], whole[..., count:, :], terms=length)


@pytest.mark.parametrize("id", DECODERS)
def test_a_file_that_lost_a_number_is_noticed(id, tmp_path):
    """The broken twin: numbers of the state that come back as others make the rest another."""
    module, inputs = decoder(id)
    count = inputs[0].shape[-2] // 2
    _, state = decode(module, inputs, last=count)
    stayed, _ = decode(module, inputs, state, first=count)
    path = tmp_path / "state.safetensors"
    snapshot.save(path, state, mechanism=module)
    # Not the same number everywhere, which a norm of groups takes away again.
    generator = torch.Generator().manual_seed(0)

    def off(x):  # but counts, which say how much of a state there is
        return x + torch.rand(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x

    spoilt = snapshot.over(snapshot.load(path, mechanism=module), off)
    rest, _ = decode(module, inputs, spoilt, first=count)
    with pytest.raises(AssertionError, match="max error"):
        assert_close(rest, stayed, stayed, terms=inputs[0].shape[-2])
    with pytest.raises(AssertionError):
        same(spoilt, state)


@pytest.mark.parametrize("id", DECODERS)
def test_a_fork_goes_its_own_way(id):
    module, inputs = decoder(id)
    count = inputs[0].shape[-2] // 2
    _, state = decode(module, inputs, last=count)
    kept = snapshot.fork(state)
    _, _ = decode(module, tuple(x.flip(-2) for x in inputs), kept, first=count)
    snapshot.over(kept, lambda x: x.zero_())
    stayed, _ = decode(module, inputs, state, first=count)
    assert same_bits(stayed, decode(module, inputs)[0][..., count:, :])


@pytest.mark.parametrize("id", DECODERS)
def test_a_step_leaves_the_state_that_it_was_given_alone(id):
    module, inputs = decoder(id)
    count = inputs[0].shape[-2] // 2
    _, state = decode(module, inputs, last=count)
    before = snapshot.fork(state)
    decode(module, inputs, state, first=count)
    same(state, before)


def prefix(seed, tokens):
    return torch.randn(3, 1, 2, tokens, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_prefix_is_read_once_and_continued_by_many(tmp_path):
    q, k, v = prefix(0, 23)
    decay = -torch.rand(2, dtype=torch.float64)
    options = {"log_decay": decay, "feature_map": "elu1", "normalizer": "sum", "return_state": True}
    _, state = linear_attention(q, k, v, **options)
    state.save(tmp_path / "prefix.safetensors", mechanism="retention")
    state = State.load(tmp_path / "prefix.safetensors", mechanism="retention")
    for seed, tokens in ((1, 7), (2, 1), (3, 65)):
        more = prefix(seed, tokens)
        whole, ended = linear_attention(*(torch.cat(pair, 2) for pair in zip((q, k, v), more, strict=True)), **options)
        o, after = linear_attention(*more, **options, state=state.fork())
        assert_close(o, whole[:, :, 23:], whole[:, :, 23:], terms=23 + tokens)
        # A stretch that was read apart is put behind the prefix without reading either again.
        composed = state.compose(linear_attention(*more, **options)[1])
        for found in (after, composed):
            assert_close(found.memory, ended.memory, ended.memory, terms=23 + tokens)
            assert_close(found.transition, ended.transition, ended.transition, terms=23 + tokens)
    # And by a batch at once.
    batch = [prefix(seed, 7) for seed in (1, 2)]
    together, _ = linear_attention(*torch.cat(batch, 1), **options, state=State.cat([state, state]))
    for row, more in zip(together, batch, strict=True):
        alone = linear_attention(*more, **options, state=state)[0][0]
        assert_close(row, alone, alone, terms=30)


def test_a_fork_of_a_state_shares_no_memory():
    one = State(torch.ones(2, 3), torch.zeros(1, 1).expand(2, 3), torch.zeros(1, 1))
    other = one.fork()
    for x, y in ((one.memory, other.memory), (one.transition, other.transition), (one.shift, other.shift)):
        assert torch.equal(x, y)
        assert x.data_ptr() != y.data_ptr()
    other.memory.zero_()
    assert one.memory.all()


def test_bytes_are_those_of_the_tensors():
    state = State(torch.zeros(2, 3, 5, 4), Matrix(torch.zeros(2, 3, 5, 5)), torch.zeros(2, 3, 1, 1))
    assert state.nbytes == 4 * (2 * 3 * 5 * 4 + 2 * 3 * 5 * 5 + 2 * 3)
    assert state.to(torch.float64).nbytes == 2 * state.nbytes
    model, cache = LM(LMConfig(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, dim=8, ffn_dim=8)), Cache()
    with torch.no_grad():
        model(torch.zeros(1, 9, dtype=torch.int64), cache)
    assert snapshot.nbytes(cache) == 2 * 2 * 9 * 4 * 4
    assert snapshot.nbytes([None, {"count": 3}, True]) == 0


def test_complex_and_empty_tensors_come_back(tmp_path):
    memory = torch.randn(2, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    state = (State(memory, torch.zeros(1, 1)), torch.zeros(2, 0, 3), None)
    snapshot.save(tmp_path / "s.safetensors", state, mechanism="mine")
    same(snapshot.load(tmp_path / "s.safetensors", mechanism="mine"), state)


@pytest.fixture
def stored(tmp_path):
    """A layer, its state after 5 tokens, and the file that holds it."""
    module, inputs = decoder("hedgehog")
    _, state = decode(module, inputs, last=5)
    state.save(tmp_path / "state.safetensors", mechanism=module)
    return module, state, tmp_path / "state.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: replace(s, memory=s.memory[:1]),
            r"like: state.memory in .* is torch.float64 of shape \(2, 2, 10, 6\)",
        ),
        (lambda s: s.to(torch.float32), r"like: state.memory in .*, where this mechanism keeps torch.float32 of shape"),
        (
            lambda s: replace(s, shift=torch.zeros(1, 1)),
            "like: state.shift in .* is NoneType, where this mechanism keeps",
        ),
        (lambda s: (s, 1), "like: state in .* is saccade.scan.state:State, where this mechanism keeps tuple; load it"),
    ],
)
def test_a_state_that_is_not_like_this_one_is_refused(stored, change, message):
    module, state, path = stored
    same(State.load(path, mechanism=module, like=state), state)
    with pytest.raises(ValueError, match=message):
        State.load(path, mechanism=module, like=change(state))


def test_a_state_of_another_is_refused(stored, tmp_path):
    module, state, path = stored
    other = mechanism("hedgehog")(Dims(4, 6, 2))
    with pytest.raises(ValueError, match=r"mechanism: got dims Dims\(.*head_dim=6.* is a state of Dims\(.*head_dim=5"):
        State.load(path, mechanism=other)
    with pytest.raises(ValueError, match=r"mechanism: got id performer, but .* is a state of hedgehog; load it there"):
        State.load(path, mechanism="performer")
    same(State.load(path, mechanism="hedgehog"), state)
    with pytest.raises(TypeError, match="mechanism: got Linear; pass the module that makes the state, or a name"):
        state.save(path, mechanism=torch.nn.Linear(1, 1))
    snapshot.save(path, (state, 5), mechanism=module)
    with pytest.raises(ValueError, match=r"path: .* holds a tuple; read it with snapshot\.load"):
        State.load(path, mechanism=module)


def rewritten(path, **changes):
    """The file again, something else said in it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()[snapshot.KEY]) | changes
    save_file(load_file(path), path, metadata={snapshot.KEY: json.dumps(said)})


def test_files_that_are_no_state_are_refused(stored, tmp_path):
    module, _, path = stored
    with pytest.raises(ValueError, match="path: no file "):
        State.load(tmp_path / "none.safetensors", mechanism=module)
    rewritten(path, version=2)
    with pytest.raises(ValueError, match=r"path: .* has version 2; this saccade reads 1"):
        State.load(path, mechanism=module)
    rewritten(path, version=1, state={"class": "os:PathLike", "parts": {}})
    with pytest.raises(ValueError, match="a part of the state is a os:PathLike, which is no class of a state here"):
        State.load(path, mechanism=module)
    rewritten(path, state={"class": "saccade.scan.snapshot:save", "parts": {}})
    with pytest.raises(ValueError, match="which is no class of a state here"):
        State.load(path, mechanism=module)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no state that saccade wrote"):
        State.load(path, mechanism=module)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is no state that saccade wrote"):
        State.load(path, mechanism=module)


class Pair(NamedTuple):
    memory: torch.Tensor
    count: int


@dataclass
class Open:
    pair: Pair
    rows: list


def test_classes_of_a_mechanisms_own_file_come_back(tmp_path):
    @dataclass
    class Mine:
        spec: object
        dims: Dims

    Mine.__module__ = __name__
    module = Mine(mechanism("gla").spec, Dims(1, 2))
    state = Open(Pair(torch.ones(2), 3), [torch.zeros(1)])
    snapshot.save(tmp_path / "s.safetensors", state, mechanism=module)
    same(snapshot.load(tmp_path / "s.safetensors", mechanism=module), state)
    with pytest.raises(ValueError, match="which is no class of a state here"):
        snapshot.load(tmp_path / "s.safetensors", mechanism="gla")
    with pytest.raises(TypeError, match="state: got a set in it; states are made of tensors"):
        snapshot.save(tmp_path / "s.safetensors", (set(),), mechanism=module)


def test_examples():
    found = doctest.testmod(snapshot)
    assert found.attempted
    assert not found.failed
