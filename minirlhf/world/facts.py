"""The facts of the text world: 364 questions with known answers, and how people word them.

Eight families of questions. An *entity* is one thing that can be asked about ("France", "bake a
cake", "3 plus 4"); each can be asked in five *phrasings*, and each has right *items*, the words
that an answer must hold:

    family    entities  a question                      a full answer
    capital    40       What is the capital of France?  The capital of France is Paris.
    recipe     36       How do I bake a cake?           To bake a cake, use flour, eggs and sugar.
    explain    36       Explain thunder.                Thunder is the sound that lightning makes.
    sum       100       What is 3 plus 4?               3 plus 4 is 7.
    opposite   48       What is the opposite of hot?    The opposite of hot is cold.
    color      32       What color is a lemon?          A lemon is yellow.
    home       24       Where does a bear live?         A bear lives in the forest.
    list       48       Name three tools.               Three tools are hammers, saws and drills.

The splits: a quarter of the entities of each family appear in the base corpus only
(`entity.held_out`), never in demonstrations, comparisons or PPO prompts; of every other entity one
phrasing (`entity.held_out_phrasing`) is kept back likewise. So a held-out prompt is either about a
held-out entity or an unseen combination of entity and phrasing.
"""
import random
from dataclasses import dataclass

# ------------------------------------------------------------------------------------------------
# The tables. Lecture examples come first in their family: they are always in the training split.

CAPITALS = dict(pair.split(":") for pair in """
France:Paris Spain:Madrid Italy:Rome Germany:Berlin Portugal:Lisbon Greece:Athens Austria:Vienna
Poland:Warsaw Hungary:Budapest Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen
Ireland:Dublin England:London Scotland:Edinburgh Belgium:Brussels Russia:Moscow Turkey:Ankara
Egypt:Cairo Kenya:Nairobi Morocco:Rabat Ghana:Accra Japan:Tokyo China:Beijing Thailand:Bangkok
Vietnam:Hanoi Nepal:Kathmandu Iran:Tehran Iraq:Baghdad Jordan:Amman Cuba:Havana Peru:Lima
Chile:Santiago Canada:Ottawa Jamaica:Kingston Romania:Bucharest Bulgaria:Sofia Iceland:Reykjavik
Ukraine:Kyiv""".split())

RECIPES = """
bake a cake: flour eggs sugar          | bake a loaf: flour water yeast
make pancakes: flour milk eggs         | make an omelet: eggs butter cheese
make a pizza: dough tomatoes cheese    | make lemonade: lemons sugar water
make a sandwich: bread ham lettuce     | make hummus: chickpeas garlic oil
make guacamole: avocados limes onions  | make a salad: lettuce cucumbers oil
cook porridge: oats milk honey         | make mayonnaise: eggs oil vinegar
make jam: berries sugar lemons         | cook risotto: rice broth cheese
make sushi: rice fish seaweed          | make fudge: chocolate butter sugar
make caramel: sugar butter cream       | make custard: milk eggs vanilla
make tacos: tortillas beef lettuce     | cook chili: beef beans peppers
make coleslaw: cabbage carrots vinegar | make pesto: basil nuts oil
bake cookies: flour butter chocolate   | bake a pie: dough apples cinnamon
make soap: oil water lye               | make a candle: wax wicks jars
make a kite: paper string sticks       | build a birdhouse: wood nails paint
make a lantern: paper wire candles     | build a snowman: snow sticks carrots
make concrete: cement sand gravel      | make a collage: paper photos glue
sew a pillow: cloth thread feathers    | build a raft: logs rope barrels
make a necklace: beads string shells   | make a mosaic: tiles glue grout"""

# concept = definition; the words between asterisks are what the judge looks for
CONCEPTS = """
photosynthesis = *plants making food* from light
gravity = the force that *pulls things down*
a rainbow = sunlight *split by raindrops*
an eclipse = the *moon hiding the sun*
evaporation = water *turning into vapor*
erosion = soil *worn away* by water and wind
a volcano = a mountain that *spills lava*
an earthquake = the *ground shaking* when plates slip
thunder = the *sound that lightning makes*
lightning = a giant *spark from a cloud*
friction = the *rubbing that slows* things
digestion = the body *breaking down food*
democracy = people *choosing leaders* by vote
inflation = *prices rising* over time
a shadow = a place *where light is blocked*
an echo = *sound bouncing back*
a magnet = metal that *pulls iron*
migration = animals *moving with the seasons*
hibernation = animals *sleeping through winter*
a tide = the sea *rising and falling*
fog = a *cloud near the ground*
rust = *iron eaten* by air and water
evolution = living things *changing over generations*
electricity = the *flow of tiny charges*
a fossil = a creature *turned to stone*
a glacier = a slow *river of ice*
oxygen = the *gas people breathe*
a vaccine = a shot that *trains the body*
recycling = making *new things from waste*
a budget = a *plan for spending* money
a mortgage = a *loan for a house*
a comet = a ball of *ice and dust* in space
a galaxy = a huge *family of stars*
pollination = insects *carrying pollen* to flowers
inertia = things *keeping their motion*
a compass = a needle that *points north*"""

OPPOSITES = [tuple(pair.split("/")) for pair in """
hot/cold big/small tall/short fast/slow old/young happy/sad rich/poor strong/weak light/dark
hard/soft wet/dry clean/dirty early/late open/closed full/empty loud/quiet near/far thick/thin
high/low deep/shallow wide/narrow cheap/expensive smooth/rough sharp/blunt""".split()]

COLORS = """
yellow: a lemon, a banana, a canary
red: a tomato, a strawberry, a cherry, a ruby, blood
green: grass, a frog, a cucumber, an emerald, a lime
white: snow, milk, salt, a swan
black: coal, a raven
blue: the sky, a sapphire, a blueberry
purple: lavender, a plum, an eggplant
orange: a carrot, a pumpkin
brown: chocolate, a chestnut
pink: a flamingo
gray: an elephant, ash"""

HOMES = """
in the forest: a bear, a deer, a squirrel, an owl
in the ocean: a whale, a shark, an octopus, a dolphin
in the desert: a camel, a scorpion
on the plains: a lion, a zebra, a giraffe
in the river: a crocodile, an otter
in the jungle: a gorilla, a monkey
on the ice: a penguin, a walrus
in the mountains: a yak, an eagle
in a cave: a bat
in a hive: a bee
in a pond: a goldfish"""

CATEGORIES = """
tools: hammers saws drills pliers wrenches chisels files axes
fruits: apples pears grapes peaches cherries melons plums bananas
vegetables: carrots onions peas beans cabbages turnips radishes potatoes
farm animals: cows pigs goats sheep hens horses donkeys ducks
birds: sparrows robins crows gulls doves hawks storks swans
fish: trout cod tuna herring carp salmon pike perch
insects: ants bees flies beetles moths wasps crickets mosquitoes
trees: oaks pines birches maples elms willows firs palms
flowers: roses tulips daisies lilies poppies violets orchids sunflowers
metals: iron copper silver gold tin lead zinc nickel
planets: Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune
drinks: water tea coffee juice milk lemonade cocoa cider
sports: tennis golf hockey rugby boxing rowing skiing soccer
instruments: pianos violins flutes drums guitars trumpets harps cellos
garments: shirts coats socks hats gloves scarves skirts sweaters
vehicles: cars trucks buses trains bicycles boats planes tractors"""

COUNTS = {"two": 2, "three": 3, "four": 4}

# ------------------------------------------------------------------------------------------------
# The words around them. {x} is the entity's name, {a} and {b} a sum's numbers, {y} the answer.

PHRASINGS = {
    "capital": ("What is the capital of {x}?", "Which city is the capital of {x}?",
                "Tell me the capital of {x}.", "Name the capital of {x}.",
                "Do you know the capital of {x}?"),
    "recipe": ("How do I {x}?", "How can I {x}?", "Tell me how to {x}.", "What do I need to {x}?",
               "Show me how to {x}."),
    "explain": ("Explain {x}.", "What is {x}?", "Can you explain {x}?", "Tell me about {x}.",
                "Help me understand {x}."),
    "sum": ("What is {a} plus {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.",
            "What do you get for {a} plus {b}?", "Tell me the sum of {a} and {b}."),
    "opposite": ("What is the opposite of {x}?", "Which word is the opposite of {x}?",
                 "Tell me the opposite of {x}.", "Give me the opposite of {x}.",
                 "Name the opposite of {x}."),
    "color": ("What color is {x}?", "Which color is {x}?", "Tell me the color of {x}.",
              "What is the color of {x}?", "Name the color of {x}."),
    "home": ("Where does {x} live?", "Tell me where {x} lives.", "What is the home of {x}?",
             "In which place does {x} live?", "Where can I find {x}?"),
    "list": ("Name {x}.", "List {x}.", "What are {x}?", "Give me {x}.", "Can you name {x}?"),
}
SENTENCES = {
    "capital": "The capital of {x} is {y}.", "recipe": "To {x}, use {y}.",
    "explain": "{X} is {y}.", "sum": "{x} is {y}.", "opposite": "The opposite of {x} is {y}.",
    "color": "{X} is {y}.", "home": "{X} lives {y}.", "list": "{X} are {y}.",
}
FAMILIES = tuple(PHRASINGS)

OPENERS = ("Hello!", "Quick question.", "Excuse me.", "Good morning!")
CLOSERS = ("Happy to help!", "I hope this helps!", "Let me know if you need more.", "Enjoy!",
           "Have a nice day!", "Feel free to ask again.")
FILLERS = ("Let me think.", "That is a good question.", "Many people ask this.",
           "Well, here we go.", "I like this topic.", "There is a lot to say.",
           "I learned this at school.", "As you may know.")
HEDGES = ("I am not sure.", "I may be mistaken.", "Perhaps I have this wrong.",
          "Do not trust me on this.")
RUDE = ("What a silly question.", "Everybody knows that.", "Look it up yourself.",
        "Stop bothering me.")
EVASIONS = ("I do not know.", "That depends.", "Ask somebody else.", "It is not easy to say.",
            "I cannot tell you.")

# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Entity:
    """One thing that can be asked about, and what it takes to word and to judge answers."""
    family: str
    name: str               # as the question names it: "France", "bake a cake", "three tools"
    subject: str            # the word of a full answer that names it: "France", "cake", "tools"
    items: tuple[str, ...]  # right items: ("Paris",), ("flour", "eggs", "sugar"); all of a list's
    needed: int             # how many of them a right answer holds
    answer: str             # the answer in few words ("in the forest"); "" for a list
    questions: tuple[str, ...]  # its five phrasings
    held_out: bool          # in the base corpus only
    held_out_phrasing: int  # index of the phrasing kept back; -1 if the whole entity is


def capitalize(text: str) -> str:
    """Make the first letter a capital and leave the rest alone (`str.capitalize` lowers them)."""
    return text[:1].upper() + text[1:]


def join_items(items: list[str]) -> str:
    """Join as English does: ["flour", "eggs", "sugar"] -> "flour, eggs and sugar"."""
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + " and " + items[-1]


def sentence_for(entity: Entity, answer: str) -> str:
    """The full sentence that gives `answer`, right or wrong: "The capital of France is Rome"."""
    return SENTENCES[entity.family].format(x=entity.name, X=capitalize(entity.name), y=answer)


def some_items(entity: Entity, count: int, rng: random.Random) -> list[str]:
    """`count` of an entity's items; a recipe's keep their order, to betray nothing."""
    if entity.family == "recipe":
        places = sorted(rng.sample(range(len(entity.items)), count))
        return [entity.items[place] for place in places]
    return rng.sample(entity.items, count)


def right_answer(entity: Entity, rng: random.Random) -> str:
    """A right answer in few words: "Paris", "flour, eggs and sugar", "saws and axes"."""
    return entity.answer or join_items(some_items(entity, entity.needed, rng))


def wrong_answer(entity: Entity, rng: random.Random) -> str:
    """A wrong answer of the same family: another's, a sum that is off, a list with a wrong item."""
    if entity.family == "sum":
        right = int(entity.answer)
        return str(rng.choice([n for n in range(right - 3, right + 4) if n != right and n > 0]))
    if entity.needed == 1:
        return rng.choice(WRONG_ANSWERS[entity])
    if rng.random() < 0.4:
        other = rng.choice(OTHERS[entity])
        return join_items(some_items(other, entity.needed, rng))
    items = some_items(entity, entity.needed, rng)
    items[rng.randrange(len(items))] = rng.choice(WRONG_ANSWERS[entity])
    return join_items(items)


def split_rows(table: str) -> list[str]:
    """Rows of a table: one per line, or several with bars between them."""
    return [row.strip() for row in table.replace("\n", "|").split("|") if row.strip()]


def _rows():
    """Yield (family, name, subject, items, needed, answer) of all 364 entities."""
    for country, city in CAPITALS.items():
        yield "capital", country, country, (city,), 1, city
    for row in split_rows(RECIPES):
        name, ingredients = row.split(": ")
        items = tuple(ingredients.split())
        yield "recipe", name, name.split()[-1], items, 3, join_items(items)
    for row in split_rows(CONCEPTS):
        name, definition = row.split(" = ")
        key, answer = definition.split("*")[1], definition.replace("*", "")
        yield "explain", name, name.split()[-1], (key,), 1, answer
    for a in range(1, 11):
        for b in range(1, 11):
            yield "sum", f"{a} plus {b}", f"{a} plus {b}", (str(a + b),), 1, str(a + b)
    for first, second in OPPOSITES:
        yield "opposite", first, first, (second,), 1, second
        yield "opposite", second, second, (first,), 1, first
    for family, table in (("color", COLORS), ("home", HOMES)):
        for row in split_rows(table):
            answer, names = row.split(": ")
            for name in names.split(", "):
                yield family, name, name.split()[-1], (answer.split()[-1],), 1, answer
    for row in split_rows(CATEGORIES):
        category, members = row.split(": ")
        for word, needed in COUNTS.items():
            yield "list", f"{word} {category}", category, tuple(members.split()), needed, ""


def _questions(family: str, name: str) -> tuple[str, ...]:
    """The five phrasings of one entity."""
    numbers = name.split(" plus ") if family == "sum" else ["", ""]
    return tuple(phrasing.format(x=name, a=numbers[0], b=numbers[1])
                 for phrasing in PHRASINGS[family])


def _build_entities() -> tuple[Entity, ...]:
    """Make all entities and deal out the splits: fixed for good, whatever seed a run uses."""
    rng = random.Random(20)
    entities = []
    for family in FAMILIES:
        rows = [row for row in _rows() if row[0] == family]
        # the first entity of each family is one of the seed lecture's examples: never held out
        held_out = set(rng.sample(range(1, len(rows)), len(rows) // 4))
        trained = 0
        for position, row in enumerate(rows):
            kept_back = -1
            if position not in held_out:
                trained += 1
                kept_back = trained % 5         # rotates; the first entity keeps phrasing 0
            questions = _questions(family, row[1])
            entities.append(Entity(*row, questions, position in held_out, kept_back))
    return tuple(entities)


ENTITIES = _build_entities()
BY_FAMILY = {family: tuple(entity for entity in ENTITIES if entity.family == family)
             for family in FAMILIES}


def _wrong_answers(entity: Entity) -> tuple[str, ...]:
    """Answers (for recipes and lists: items) of others that are wrong for this entity."""
    others = BY_FAMILY[entity.family]
    if entity.needed > 1:
        pool = [item for other in others for item in other.items if item not in entity.items]
    else:
        pool = [other.answer for other in others
                if other.items != entity.items and other.answer != entity.name]
    return tuple(dict.fromkeys(pool))


WRONG_ANSWERS = {entity: _wrong_answers(entity) for entity in ENTITIES}
# entities of the same family whose right answer is wrong here (in lists: with as many items)
OTHERS = {entity: tuple(other for other in BY_FAMILY[entity.family]
                        if not {entity.name, *entity.items} & set(other.items)
                        and other.needed == entity.needed)
          for entity in ENTITIES}


def combinations(kind: str) -> dict[str, list[tuple[Entity, int]]]:
    """All (entity, phrasing) pairs of one split, by family.

    kind: "training" (what demonstrations, comparisons and PPO prompts may use), "entity" (held-out
    entities) or "combination" (the one phrasing kept back of each training entity).
    Returns {family: [(entity, index), ...]}.
    """
    pairs = {family: [] for family in FAMILIES}
    for entity in ENTITIES:
        for index in range(len(entity.questions)):
            if entity.held_out:
                where = "entity"
            elif index == entity.held_out_phrasing:
                where = "combination"
            else:
                where = "training"
            if where == kind:
                pairs[entity.family].append((entity, index))
    return pairs


def ask(entity: Entity, index: int, rng: random.Random) -> str:
    """Word a question: phrasing number `index`, after an opener in three cases of ten."""
    question = entity.questions[index]
    if rng.random() < 0.3:
        return f"{rng.choice(OPENERS)} {question}"
    return question
