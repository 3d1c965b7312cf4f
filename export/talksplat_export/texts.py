"""Endless varied sentences for synthetic speech, made from word lists; the same seed gives the same sentences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def _words(text: str) -> list[str]:
    return text.split()


_NAMES = _words(
    """
    Alice Bertha Boris Brooke Charles Chloe Daphne Dmitri Edith Felix Fiona George Grace Hugo Isla Jasper Joyce
    Keith Laura Marvin Matthew Naomi Oliver Paula Phoebe Quentin Rachel Samuel Sophia Theo Ursula Victor Wanda
    Xavier Yvonne Zachary
    """
)
_NOUNS = _words(
    """
    apple athlete baker bathtub beach bicycle boat book bottle bridge brother bubble bush butter cabbage camera
    candle carpet castle cheese chicken church cloud coffee computer couch cousin dinosaur doctor dolphin door
    dream earth elephant engine evening farmer father feather finger fish flower forest fox fudge garage garden
    giraffe glove guitar hammer harbour hedge honey horse island jacket jewel judge jungle kettle kitchen knife
    ladder language leaf leather lemon letter lighthouse lion lobster machine map market measure memory milk
    mirror money monkey moon mother mountain mouse mouth movie mushroom music neighbour newspaper ocean office
    onion orange oyster paper park pepper piano picture pillow pirate planet pleasure police potato powder
    pumpkin puzzle queen question rabbit radio rainbow river road robot rocket roof rope sandwich sausage school
    scissors shadow sheep ship shovel sister snow soap soup spoon spring station stone storm story sugar summer
    table teacher thief thumb thunder tiger tooth tower toy train treasure tree trouble truth umbrella uncle
    valley vegetable version village violin vision voice water weather whale wheel whistle window wolf woman
    wool yacht yellow yoghurt zebra zipper
    """
)
_ADJECTIVES = _words(
    """
    amber ancient awful beautiful big bitter black blue brave bright broken brown busy cheap chubby clever
    cloudy cold crooked curious damp dark deep early empty enormous famous fast fluffy foolish fresh funny
    gentle giant golden grey happy heavy huge humble invisible jolly joyful kind large lazy little loud lovely
    lucky modern mysterious narrow new noisy odd old orange pale peaceful polite poor proud pure purple quick
    quiet rare red rough round rusty sharp shiny short shy silly silver simple slow smooth soft spicy square
    strange strong sweet tall thick thin tiny tough unusual usual vague warm weak wet white wide wild wise
    worthy young
    """
)
_VERBS = _words(
    """
    asked avoided baked bit blamed borrowed bought brought brushed built called carried caught changed chased
    chose cleaned climbed counted covered described dragged drew dropped enjoyed fed feared filled finished
    fixed followed forgot found gave grabbed guessed heard helped hid hugged imagined judged kept kicked kissed
    knew left lifted liked lost loved made measured missed mixed moved noticed opened painted picked placed
    pulled pushed reached remembered rescued saved saw sold sent shared showed shook stole studied taught threw
    thanked touched trusted used visited wanted washed watched weighed wished woke wrote
    """
)
_ADVERBS = _words(
    """
    again almost always badly boldly calmly carefully early easily gladly hardly loudly maybe nearly never often
    patiently perhaps politely proudly quickly quietly rarely roughly slowly smoothly softly sometimes soon
    suddenly surely together too twice usually very warmly weekly well wisely yearly
    """
)
_PREPOSITIONS = _words(
    """
    above across after against along among around before behind below beneath beside between beyond by during
    for from in inside into near off on outside over past through towards under until with without
    """
)
_FUNCTION_WORDS = _words(
    """
    I you he she it we they me him us them a a a an the the the this that these those my your its some any every each
    is was are were be been am has have had do does did can could will would shall should may might must of of to to
    to in on at as by for with about from and and or but not if so than then there here what which who whom now just
    only also very more most much many other such no yes let us I am you are that's it's don't can't
    """
)
_QUESTIONS = ["why", "when", "where", "how", "how often", "who said that", "do you think"]
_DIGITS = _words("zero one two three four five six seven eight nine")
_SENTENCES = """A pale moth circled the porch lamp all night.
Both boys pumped water from the deep well.
Please put my brown umbrella by the front door.
She sells fresh shellfish from a wooden cart.
The judge chose a cheap orange for his lunch.
Five fat frogs leapt off the floating leaf.
We heard a whistle, then the wheels began to turn.
Measure the flour twice before you bake the bread.
His usual pleasure was a long walk by the river.
Thick fog threatened both of the northern paths.
You never know how far a young voice will carry.
Bob's baby bumped a big blue bubble bath.
My mother may move home by the month of May.
Would you wait while we wash the woollen blanket?
Zoe's cousins gaze at the hazy purple horizon.
The king sang a long song about strong young men.
Vivian gave eleven violets to every visitor.
Are you absolutely sure that this is the right road?
Oh, I see! That is what you meant the other day.
Hello, and welcome. My name is on the door, come in.
Good morning, how can I help you today?
Thank you very much, I will be back in a moment.
No, that does not sound right to me at all.
Yes, of course, we can look at it together.
Put the pepper pot back up on top of the cupboard.
Few of us ever view the full moon above the valley.
Watch the children jump over the ditch by the church.
The rough coughing of the old engine was enough for us.
Our hour of power flowers came around without a sound.
Joyce avoided the noisy toys and enjoyed the oysters.""".splitlines()
_ENGLISH_ONSETS = _words(
    """
    p b m f v w t d n l s z r k g h j y sh ch th p b m f v w bl br cl cr dr dw fl fr gl gr pl pr qu sc scr shr sk sl sm
    sn sp spl spr squ st str sw thr tr tw wh
    """
)
_ENGLISH_VOWELS = _words("a e i o u a e i o u ee oo ea ai ay ow oi ou ar er or ir ur igh oa aw ew ie")
_ENGLISH_CODAS = _words(
    "b ck d dge f ff g l ll lt m mp n nd ng nk nt p pt r rb rd rm rn rt s sh sk sp ss st t tch th v ve x z ft lm ph mb"
)
_ENGLISH_ENDINGS = _words("ing ed er ly y tion ment ness able al es ous ish ive le ow ful ism or ity")
_ONSETS = _words("p b m f v w t d n l s z r k g h j sh ch bl br dr fl gr kl kr pl pr sp st tr")
_VOWELS = _words("a e i o u ai au ei ou")
_CODAS = ["", "", "", "", "n", "m", "l", "s", "r", "t", "k", "p"]


def english(seed: int) -> Iterator[str]:
    """Sentences of the grammar, of a fixed list, strings of digits and random word sequences, without end.

    Half of them draw on invented words that sound English: what learns from a few hundred words learns the words, and
    not their sounds.
    """
    rng = np.random.default_rng(seed)

    def one_of(words: list[str]) -> str:
        return words[int(rng.integers(len(words)))]

    def invented_word() -> str:
        syllables = "".join(
            one_of(_ENGLISH_ONSETS) * (n > 0 or rng.random() < 0.85)
            + one_of(_ENGLISH_VOWELS)
            + one_of(_ENGLISH_CODAS) * (rng.random() < 0.6)
            for n in range(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
        )
        return syllables + one_of(_ENGLISH_ENDINGS) * (rng.random() < 0.3)

    def chatter() -> str:
        words = [
            one_of(_FUNCTION_WORDS) if rng.random() < 0.45 else invented_word() for _ in range(rng.integers(5, 14))
        ]
        if len(words) > 7 and rng.random() < 0.5:
            words[len(words) // 2] += ","
        return f"{' '.join(words)}{one_of(['.', '.', '!', '?'])}"

    def noun_phrase() -> str:
        noun = one_of(_NOUNS) if rng.random() < 0.6 else f"{one_of(_ADJECTIVES)} {one_of(_NOUNS)}"
        if rng.random() < 0.2:
            return f"{one_of(_DIGITS[2:])} {noun}s"
        return f"{one_of(['the', 'the', 'my', 'your', 'this', 'that', 'our', 'his', 'her'])} {noun}"

    def place() -> str:
        return f"{one_of(_PREPOSITIONS)} {noun_phrase()}"

    def clause() -> str:
        subject = one_of(_NAMES) if rng.random() < 0.4 else noun_phrase()
        adverb = f" {one_of(_ADVERBS)}" if rng.random() < 0.3 else ""
        where = f" {place()}" if rng.random() < 0.6 else ""
        return f"{subject}{adverb} {one_of(_VERBS)} {noun_phrase()}{where}"

    def sentence() -> str:
        if rng.random() < 0.5:
            return chatter()
        kind = rng.random()
        if kind < 0.45:
            joined = (
                f", {one_of(['and', 'but', 'because', 'so', 'while', 'although'])} {clause()}"
                if rng.random() < 0.4
                else ""
            )
            return f"{clause()}{joined}{one_of(['.', '.', '.', '!'])}"
        if kind < 0.55:
            return f"{one_of(_QUESTIONS)} {noun_phrase()} {one_of(_VERBS)} {noun_phrase()}?"
        if kind < 0.7:
            return one_of(_SENTENCES)
        if kind < 0.78:
            return f"{', '.join(one_of(_DIGITS) for _ in range(rng.integers(3, 8)))}."
        vocabulary = [_NOUNS, _ADJECTIVES, _VERBS, _ADVERBS, _NAMES, _PREPOSITIONS]
        return f"{' '.join(one_of(vocabulary[rng.integers(len(vocabulary))]) for _ in range(rng.integers(4, 10)))}."

    while True:
        text = sentence()
        yield text[0].upper() + text[1:]


def invented(seed: int) -> Iterator[str]:
    """Sentences of invented words that any language's voice can read, without end."""
    rng = np.random.default_rng(seed)

    def one_of(parts: list[str]) -> str:
        return parts[int(rng.integers(len(parts)))]

    def word() -> str:
        return "".join(one_of(_ONSETS) + one_of(_VOWELS) + one_of(_CODAS) for _ in range(rng.integers(1, 4)))

    while True:
        yield f"{' '.join(word() for _ in range(rng.integers(4, 9)))}."
