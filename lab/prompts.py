"""What the evaluation asks for: prompts to choose options by, and others to report by.

Pairs of colour and object that no training image shows are in the second set alone, and no prompt
is in both: the first says "large", "grey background", "the" and "one", the second never does."""
from dataclasses import dataclass

from toy import COLOURS, OBJECTS, UNSEEN

CHOOSE = ("a large {colour} {object}", "a {colour} {object} on a grey background",
          "the {colour} {object}", "one {colour} {object}")
LONG = ("a small {colour} {object} on a white background",
        "a {colour} {object} on a sky background",
        "a small {colour} {object} on a sand background")
PARAPHRASES = (  # none of toy.CAPTIONS, of which one alone puts the object first
    "the {object} is {colour}", "there is a {object}, {colour}", "a {object} in {colour}",
    "{object}, {colour}", "a {object}. it is {colour}")


@dataclass
class Prompts:
    """P texts and what each asks for: attributes of a drawing, known of the toy world alone."""
    texts: list
    wanted: list | None = None
    times: int = 1               # images of each are so many times those of other prompts


def toy_prompts():
    """Every colour with every object: [{"colour", "object"}], and "a {colour} {object}" of each."""
    wanted = [{"colour": c, "object": o} for c in COLOURS for o in OBJECTS]
    return wanted, ["a {colour} {object}".format(**w) for w in wanted]


def is_unseen(wanted):
    return (wanted["colour"], wanted["object"]) in UNSEEN


def worded(pairs, wordings):
    """One prompt of each pair; every object and every colour meets every wording."""
    texts, wanted = [], []
    for pair in pairs:
        number = list(COLOURS).index(pair["colour"]) + OBJECTS.index(pair["object"])
        text = wordings[number % len(wordings)].format(**pair)
        before, _, after = text.partition(" on a ")
        texts.append(text)
        wanted.append(pair | ({"background": after.split()[0]} if before != text else {}))
    return Prompts(texts, wanted)


def choosing_prompts():
    """A prompt of each seen pair, in wordings that are reported nowhere."""
    return worded([pair for pair in toy_prompts()[0] if not is_unseen(pair)], CHOOSE)


def reported_prompts():
    """{kind: Prompts}: of every pair a plain one, a long one and a paraphrase; the unseen pairs."""
    pairs, plain = toy_prompts()
    unseen = [i for i, pair in enumerate(pairs) if is_unseen(pair)]
    return {"plain": Prompts(plain, pairs), "long": worded(pairs, LONG),
            "paraphrased": worded(pairs, PARAPHRASES),
            "unseen": Prompts([plain[i] for i in unseen], [pairs[i] for i in unseen], times=4)}
