"""Beam search, the texts of sequence-level distillation, and what must hold of them."""

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core import knobs
from limbeck.core.batches import Batches, Table
from limbeck.core.beam import Beams, Kept, beam, best
from limbeck.core.errors import Interrupted
from limbeck.core.generate import sample
from limbeck.core.loop import Clock, Plan, fit
from limbeck.core.maths import kl
from limbeck.core.nets import Batch, Nets
from limbeck.core.ngrams import sentence_bleu
from limbeck.core.policy import completions, starts, text
from limbeck.losses.logits.ce import ce
from tests import networks

WORDS, LENGTH, EXAMPLES, END = 5, 6, 24, 4


Speaker = partial(networks.Speaker, words=WORDS, spread=3.0)


def likelihood(net: nn.Module, row: list[int], start: int) -> float:
    with torch.no_grad():
        said = net(torch.tensor([row]))[0].log_softmax(-1)
    return sum(float(said[i - 1, row[i]]) for i in range(start, len(row)))


def exhaustive(net: nn.Module, prompt: list[int], room: int, penalty: float, end: int | None) -> list[Any]:
    """(score, log-likelihood, text) of every text, the best first."""
    found = {}
    for more in itertools.product(range(WORDS), repeat=room):
        kept = more[: more.index(end) + 1] if end is not None and end in more else more
        found[kept] = likelihood(net, [*prompt, *kept], len(prompt))
    return sorted(((v / len(k) ** penalty, v, [*prompt, *k]) for k, v in found.items()), reverse=True)


def table() -> Table:
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(WORDS, (EXAMPLES, LENGTH + 1), generator=g)
    mask = torch.arange(1, LENGTH + 1) >= torch.randint(1, 4, (EXAMPLES, 1), generator=g)
    return Table({"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "mask": mask}, "tokens")


def batches() -> Batches:
    return Batches(table(), 8, seed=1)


def pair() -> Nets:
    return Nets(teacher=Speaker(1), student=Speaker(2))


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("end", [None, END])
def test_a_beam_of_all_texts_is_exhaustive_search(penalty: float, end: int | None):
    net = Speaker(3)
    prompts, lengths = torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.tensor([2, 2, 1])
    found = beam(net, prompts, 3, WORDS**4, penalty=penalty, lengths=lengths, end=end)
    for b, start in enumerate(lengths.tolist()):
        wanted = exhaustive(net, prompts[b, :start].tolist(), 5 - start, penalty, end)
        assert int(found.logprobs[b].isfinite().sum()) == len(wanted)
        for k, (score, logprob, line) in enumerate(wanted):
            assert found.logprobs[b, k].item() == pytest.approx(logprob, abs=1e-4)
            count = int(found.counts[b, k])
            assert logprob / count**penalty == pytest.approx(score, abs=1e-6) and count == len(line) - start
            assert found.tokens[b, k, : start + count].tolist() == line
            assert end is None or (found.tokens[b, k, start + count :] == end).all()


def test_a_narrow_beam_tells_true_likelihoods_in_order_and_beats_greed():
    net, prompts = Speaker(4), torch.arange(15).view(5, 3) % 4
    found = beam(net, prompts, 5, 3, end=END)
    greedy = sample(net, prompts, 5, 0.0, end=END)
    for b in range(5):
        lines = [found.tokens[b, k, : 3 + int(found.counts[b, k])].tolist() for k in range(3)]
        assert len({tuple(line) for line in lines}) == 3
        told = [likelihood(net, line, 3) for line in lines]
        assert found.logprobs[b].tolist() == pytest.approx(told, abs=1e-4) and told == sorted(told, reverse=True)
        stop = greedy[b, 3:].tolist()
        line = greedy[b, : 4 + stop.index(END)].tolist() if END in stop else greedy[b].tolist()
        assert told[0] >= likelihood(net, line, 3) - 1e-5
    assert torch.equal(beam(net, prompts, 5, 1, end=END).tokens[:, 0], greedy)


def test_a_longer_text_wins_by_the_length_rule():
    class Steps(nn.Module):
        """Ends at once with 0.5, else says 1 with 0.4 and ends surely."""

        def forward(self, tokens: Tensor) -> Tensor:
            p = torch.tensor([[0.1, 0.4, 0, 0, 0.5], [0, 0, 0, 0, 1.0]]).clamp_min(1e-9)
            return p.log()[(tokens == 1).long()]

    prompt = torch.zeros(1, 1, dtype=torch.long)
    assert beam(Steps(), prompt, 2, 4, end=END).tokens[0, 0].tolist() == [0, END, END]
    assert beam(Steps(), prompt, 2, 4, penalty=1.0, end=END).tokens[0, 0].tolist() == [0, 1, END]


def test_texts_that_have_ended_are_not_asked_about():
    net = Speaker(4)
    beam(net, torch.zeros(6, 1, dtype=torch.long), 6, 4)
    whole, net.asked = net.asked, 0
    beam(net, torch.zeros(6, 1, dtype=torch.long), 6, 4, end=END)
    assert whole == 6 * (1 + 5 * 4) and 0 < net.asked < whole


def test_what_cannot_be_searched_is_refused():
    prompts = torch.zeros(2, 2, dtype=torch.long)
    for given, said in (({"beams": 0}, "`beams`"), ({"penalty": -1.0}, "`penalty`"), ({"length": -1}, "`length`")):
        with pytest.raises(ValueError, match=said):
            beam(Speaker(1), prompts, **{"length": 2, **given})
    with pytest.raises(ValueError, match=r"`lengths` must be in \[1, 2\]"):
        beam(Speaker(1), prompts, 2, lengths=torch.tensor([0, 2]))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_with_and_without_a_cache_the_beams_are_the_same(kind: str):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0, "vocab_size": 20, "initializer_range": 0.3}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **ends}
    model: Any
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **ends)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **sizes))
    else:
        config = transformers.MistralConfig(num_key_value_heads=2, sliding_window=4, **sizes)
        model = transformers.MistralForCausalLM(config)

    class Anew(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = model(input_ids=tokens, use_cache=False).logits
            return out

    read: list[int] = []
    hook = lambda _m, _a, given, _o: read.append(given["input_ids"].shape[1])
    handle = model.register_forward_hook(hook, with_kwargs=True)
    prompts, lengths = torch.arange(15).view(3, 5), torch.tensor([5, 2, 3])
    found = beam(model.eval(), prompts, 8, 4, lengths=lengths, end=7)
    handle.remove()
    wanted = beam(Anew(), prompts, 8, 4, lengths=lengths, end=7)
    assert read[0] == 2 and set(read[1:]) == {1}  # the shortest prompt at once, then a token a step
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=1e-4, atol=1e-4)


def test_a_network_that_can_spare_logits_is_asked_for_the_last_alone():
    from limbeck.zoo.transformer import tiny_lm

    torch.manual_seed(0)
    net = tiny_lm(vocab=11, width=16, layers=1).eval()
    plain = nn.Module()
    plain.forward = lambda tokens: net(tokens)["logits"]  # type: ignore[method-assign]
    prompts = torch.randint(11, (4, 3))
    found, wanted = beam(net, prompts, 5, 3, end=0), beam(plain, prompts, 5, 3, end=0)
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the methods


def test_the_loss_is_that_of_the_teachers_likeliest_text_on_the_completion_alone():
    nets, batch = pair(), next(batches())
    method: Any = knobs.make("seqkd", {"beams": 4, "end": END})
    method.setup(nets, batch)
    ((player, parts),) = method.step(nets, batch, Clock(0, 10))
    total, places = 0.0, 0
    for b, start in enumerate(starts(batch).tolist()):
        found = beam(nets.teacher, text(batch)[b : b + 1, :start], LENGTH + 1 - start, 4, end=END)
        line = found.tokens[0, 0, : start + int(found.counts[0, 0])].tolist()
        total -= likelihood(nets.student, line, start)
        places += len(line) - start
    assert player == "student" and parts["ce"].value.item() == pytest.approx(total / places, rel=1e-5)


def test_each_text_is_written_once():
    nets, data = pair(), batches()
    method: Any = knobs.make("seqkd", {"beams": 3})
    method.setup(nets, next(data))
    texts: dict[int, list[int]] = {}
    for t in range(6):  # two epochs
        batch, before = next(data), nets.teacher.asked
        ((_, _),) = method.step(nets, batch, Clock(t, 6))
        assert (nets.teacher.asked > before) == bool(set(batch["index"].tolist()) - set(texts))
        for i in batch["index"].tolist():
            line = nets.written.texts[i].tolist()
            assert texts.setdefault(i, line) == line
    assert len(texts) == EXAMPLES and nets.written.known.all()
    alone = best(nets.teacher, {**table().columns, "index": torch.arange(EXAMPLES)}, 3, penalty=0, prompt=1, end=-1)
    assert torch.equal(nets.written.texts.long(), alone.tokens[:, 0])


@pytest.mark.parametrize("name", ["seqkd", "seq_inter"])
def test_a_run_that_was_cut_goes_on_with_the_same_bits(name: str, tmp_path: Path):
    def run(folder: Path, **more: Any) -> Nets:
        nets, method = pair(), knobs.make(name, {"beams": 3, "end": END, "match": ("ce", "forward_kl")})
        plan = Plan(8, optimizer={"adam": {"lr": 0.01}}, log_every=1)
        return fit(method, nets, Batches(table(), 4, seed=1), plan, folder=folder, **more).nets

    def cut(event: dict[str, Any]) -> None:
        if event["t"] == 3:
            import signal

            signal.raise_signal(signal.SIGTERM)

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", on_event=cut)
    again = run(tmp_path / "cut", resume=True)
    for root in ("student", "written"):
        for key, value in whole.find(root).state_dict().items():
            assert torch.equal(value, again.find(root).state_dict()[key]), f"{root}.{key}"
    assert whole.written.known.all()
    assert again.teacher.asked < whole.teacher.asked  # the texts of before the cut were not written again


def test_seq_inter_of_one_text_is_the_data_of_seqkd():
    batch, ends = next(batches()), []
    for name in ("seqkd", "seq_inter"):
        nets, method = pair(), knobs.make(name, {"beams": 1, "end": END})
        method.setup(nets, batch)
        ((_, parts),) = method.step(nets, batch, Clock(0, 10))
        ends.append((nets.written.texts, parts["ce"].value.item()))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_the_chosen_text_is_the_most_like_the_datas_answer_and_no_worse_than_the_likeliest():
    nets, batch = pair(), next(batches())
    method: Any = knobs.make("seq_inter", {"beams": 12, "end": END})
    chosen = method.write(nets, batch)
    found = best(nets.teacher, batch, 12, penalty=0, prompt=1, end=END)
    mask, better = completions(batch), 0
    for b, start in enumerate(starts(batch).tolist()):
        wanted = [i for i in batch["labels"][b][mask[b]].tolist() if i != END]

        def score(line: Tensor, start: int = start, wanted: list[int] = wanted) -> float:
            written = line[start:].tolist()
            kept = written[: written.index(END)] if END in written else written
            return sentence_bleu(kept, wanted)

        scores = [score(line) for line, told in zip(found.tokens[b], found.logprobs[b], strict=True) if told > -1e9]
        assert score(chosen[b]) == max(scores) >= scores[0]
        better += max(scores) > scores[0]
    assert better  # or the search would be for nothing


def test_a_list_without_a_further_text_offers_none():
    nets, batch = pair(), next(batches())
    found = best(nets.teacher, batch, 2, penalty=0, prompt=1, end=END)
    short = Beams(found.tokens, found.logprobs.clone(), found.counts)
    short.logprobs[:, 1] = float("-inf")
    method: Any = knobs.make("seq_inter", {"beams": 2, "end": END})
    assert (method.likeness(short, batch)[:, 1] == -1).all() and (method.likeness(found, batch) >= 0).all()


def test_word_level_distillation_from_a_sure_teacher_is_the_nll():
    logits, labels = torch.randn(4, 3, WORDS, dtype=torch.float64), torch.randint(WORDS, (4, 3))
    sure = torch.nn.functional.one_hot(labels, WORDS).double() * 1e3
    torch.testing.assert_close(kl(logits, sure), ce(logits, labels))


def test_levels_combine():
    nets, batch = pair(), next(batches())
    method: Any = knobs.make("seqkd", {"match": ("ce", {"forward_kl": {"weight": 0.5}}), "beams": 2})
    method.setup(nets, batch)
    ((_, parts),) = method.step(nets, batch, Clock(0, 10))
    new = {**batch, "inputs": nets.written.texts[batch["index"], :-1].long()}
    student, teacher = nets.run("student", new)["logits"], nets.run("teacher", new)["logits"]
    wanted = 0.5 * kl(student, teacher)[completions(batch)].mean().item()
    assert parts["forward_kl"].value.item() == pytest.approx(wanted, rel=1e-5)


def test_without_numbers_texts_are_written_each_time():
    nets, batch = pair(), {k: v for k, v in next(batches()).items() if k != "index"}
    method: Any = knobs.make("seqkd", {"beams": 2})
    method.setup(nets, batch)
    assert "written" not in nets
    ((_, first),) = method.step(nets, batch, Clock(0, 10))
    ((_, second),) = method.step(nets, batch, Clock(1, 10))
    assert first["ce"].value.item() == second["ce"].value.item()


def test_only_new_examples_are_written():
    kept, seen = Kept(4, 3), []

    def write(batch: Batch) -> Tensor:
        seen.append(batch["inputs"][:, 0].tolist())
        return batch["inputs"] + 10

    tokens = torch.arange(12).view(4, 3)
    for rows in ([0, 2], [2, 3], [0, 3]):
        index = torch.tensor(rows)
        found = kept.read({"inputs": tokens[index], "index": index}, write)
        assert torch.equal(found, tokens[index] + 10)
    assert seen == [[0, 6], [9]] and kept.known.tolist() == [True, False, True, True]
    assert copy.deepcopy(kept).state_dict().keys() == {"texts", "known"}
