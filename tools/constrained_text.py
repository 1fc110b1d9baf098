#!/usr/bin/env python
"""Texts in which given words must appear, and how likely that was.

    python tools/constrained_text.py runs/sotu_bpe/model --words peace war money
    python tools/constrained_text.py runs/smollm2_hmm/model --words river bank money \\
        --language-model datasets/models/smollm2 --prompt "The old man" --num 100

Without a language model the hidden Markov model itself is sampled given the constraint, exactly.
With one, the language model generates and the hidden Markov model looks ahead for it: tokens after
which the words no longer fit get probability 0. Every text is checked by looking for the words in
it; the exit status is 1 if one lacks any.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from distpc.circuits.chain import Chain
from distpc.data.spec import DatasetSpec
from distpc.data.tokenizers import Tokenizer, check_tokenizer, load_tokenizer, tokenizer_of
from distpc.errors import DistpcError
from distpc.inference.automaton import Automaton
from distpc.inference.constraints import ConstrainedChain
from distpc.inference.guidance import Guidance, logits_processor, word_constraint
from distpc.inference.model import open_model
from distpc.teachers.sampling import load_causal, start_and_end


def of_chain(
    chain: Chain, automaton: Automaton, options: argparse.Namespace
) -> tuple[list[list[int]], float]:
    """Texts of the hidden Markov model, and nats of the constraint before the first token."""
    constrained = ConstrainedChain(chain, automaton)
    start = torch.zeros(1, dtype=torch.int64, device=chain.start.device)
    nats = float(constrained.log_prob(chain.starts(1), start, options.length))
    rows = constrained.sample(options.num, options.length, options.seed)
    return rows.tolist(), nats


def of_language_model(
    chain: Chain, automaton: Automaton, options: argparse.Namespace, tokenizer: Tokenizer
) -> tuple[list[list[int]], float]:
    """Texts of the guided language model, and nats of the constraint given the prompt."""
    from transformers import LogitsProcessorList

    folder = options.language_model
    start, _ = start_and_end(folder, tokenizer, options.start_token)
    model = load_causal(folder).to(chain.start.device)
    prompt = torch.tensor([[start, *tokenizer.encode(options.prompt).tolist()]])
    prompt = prompt.expand(options.num, -1).to(chain.start.device)
    guidance = Guidance(chain, automaton, prompt.shape[1], options.length, skip=1)
    constrained = guidance.constrained
    states = chain.read(prompt[:1, 1:]).states
    nats = float(constrained.log_prob(states, constrained.table.new_zeros(1), options.length))
    torch.manual_seed(options.seed)
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=options.length,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        pad_token_id=start,
        logits_processor=LogitsProcessorList([logits_processor(guidance)]),
    )
    return made[:, prompt.shape[1] :].tolist(), nats


def texts_of(rows: list[list[int]], tokenizer: Tokenizer, spec: DatasetSpec) -> list[str]:
    """What was generated, up to the token that ends a document."""
    cut = [row[: row.index(spec.end_token)] if spec.end_token in row else row for row in rows]
    return [tokenizer.decode(row) for row in cut]


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Generate, check, and describe."""
    circuit, spec = open_model(options.model)
    chain = Chain.of(circuit)
    tokenizer = tokenizer_of(spec, options.model)
    automaton = word_constraint(options.words, tokenizer, chain.vocabulary, spec.end_token)
    began = time.perf_counter()
    if options.language_model is None:
        rows, nats = of_chain(chain, automaton, options)
    else:
        own = load_tokenizer(options.language_model)
        check_tokenizer(spec, own, options.language_model)
        rows, nats = of_language_model(chain, automaton, options, own)
    texts = texts_of(rows, tokenizer, spec)
    words = [word.lower() for word in options.words]
    met = [all(word in text.lower() for word in words) for text in texts]
    return {
        "words": options.words,
        "length": options.length,
        "states_of_the_automaton": automaton.num_states,
        "log_prob_of_the_words": nats,
        "num": len(texts),
        "met": sum(met),
        "seconds": round(time.perf_counter() - began, 2),
        "texts": texts,
    }


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="folder of a hidden Markov model with tied steps")
    add("--words", nargs="+", required=True, help="that must appear, in any order")
    add("--num", type=int, default=100, help="texts (default 100)")
    add("--length", type=int, default=32, help="tokens of each (default 32)")
    add("--seed", type=int, default=0)
    add("--language-model", type=Path, help="folder of a causal model with the same tokenizer")
    add("--prompt", default="", help="what the language model goes on from")
    add("--start-token", help="what texts begin after (default: the model's own)")
    add("--json", type=Path, help="write the result, with all texts")
    return parser.parse_args()


def main() -> int:
    """Generate and report; 0 if every text has all words."""
    options = read_options()
    try:
        result = generate(options)
    except DistpcError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for text in result["texts"][:5]:
        print("|", text.replace("\n", " "))
    print(f"log p(words) = {result['log_prob_of_the_words']:.3f} nats")
    print(f"{result['met']} of {result['num']} texts have all of: {', '.join(options.words)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["met"] == result["num"] else 1


if __name__ == "__main__":
    sys.exit(main())
