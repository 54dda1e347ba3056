"""What `tiny`'s teacher is asked: prompts put together from lists, so that few are ever asked twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random


def _entries(text: str) -> list[str]:
    """What stands between bars and ends of lines."""
    return text.replace("\n", "|").split("|")


NAMES = _entries(
    """Lily|Tom|Anna|Ben|Mia|Sam|Lucy|Max|Emma|Jack|Rosa|Leo|Nina|Omar|Clara|Hugo|Ella|Finn|Maya|Noah|Ruby|Paul
Grace|Ivan|Sofia|Adam|Jane|Peter|Kate|Daniel|Alice|Henry|Zoe|George|Amy|Oscar|Julia|Simon|Eva|Mark|Hannah
David|Nora|Luke|Molly|Victor|Sara|Felix|Laura|Theo|Iris|Martin|Dora|Carlos|Tessa|Walter|Marta|Frank|Leila
Joe"""
)

PEOPLE = _entries(
    """a farmer|a fisherman|a baker|a teacher|a nurse|a young painter|an old soldier|a gardener|a bus driver
a shy girl|a brave boy|a clever thief|a lonely king|a proud queen|a poor tailor|a kind doctor|a sailor
a librarian|a shepherd|a cook|a clock maker|a musician|a postman|a carpenter|twin sisters|two brothers
a grandmother|an inventor|a lazy student|a miller|a dancer|a train driver|a night watchman|a beekeeper
a young mother|a firefighter|a mayor|a blind man|a street singer|a lighthouse keeper|a new boy at school
a tired father|a rich merchant|a hunter|a potter"""
)

ANIMALS = _entries(
    """a dog|a cat|a rabbit|a fox|a bear|a mouse|an owl|a duck|a frog|a horse|a goat|a turtle|a crow|a squirrel
a pig|a hen|a wolf|a bee|a butterfly|a donkey|a sheep|an elephant|a monkey|a lion|a snail|a hedgehog|a deer
a parrot|a whale|an ant|a swan|a cow|a goose|a bat|a crab|a seal|a penguin|a small dragon|a spider|a beaver"""
)

PLACES = _entries(
    """a forest|a small village|a big city|a farm|a school|an island|the mountains|a castle|a harbour|a market
a library|a garden|a train station|a kitchen|a hospital|the desert|a river bank|a bridge|a museum|a cave
the beach|a bakery|a park|a snowy field|an old house|a lighthouse|a workshop|a theatre|a ship|a bus|an attic
a mill|a zoo|a playground|a shop|a tower|a valley|a lake|a camp|an apple orchard"""
)

THINGS = _entries(
    """a key|a red hat|a letter|a lamp|a broken clock|a map|a boat|a coin|a book|a kite|a bell|a ring|a mirror
a basket|an umbrella|a bicycle|a drum|a wooden box|a blue stone|a loaf of bread|a seed|a violin|a candle
a ladder|a rope|a feather|a painting|a pair of shoes|a cake|a bucket|a lost glove|a telescope|a photograph
a ball|a blanket|a knife|a jar of honey|a piece of string|a door that will not open|a necklace|a wheel
a tent|a suitcase|a pumpkin|a snowman|a song|a shadow|a secret|a promise|a dream"""
)

FEELINGS = _entries(
    """brave|kind|greedy|lonely|curious|honest|patient|jealous|proud|afraid of the dark|forgetful|cheerful|stubborn
shy|angry|grateful|clumsy|generous|careful|tired|hopeful|quiet|playful|worried|wise|lazy"""
)

EVENTS = _entries(
    """a storm comes|something is lost|a stranger arrives|a promise is broken|a friend moves away|a race is held
it begins to snow|a fire breaks out|a baby is born|a mistake is made|someone tells a lie|a gift is given
the power goes out|a door is left open|a birthday is forgotten|a plan goes wrong|a new friend is found
someone gets lost|a contest is won|a sound is heard at night|a bridge falls|the well runs dry
a ship does not come back|an animal is hurt|a wall is painted|someone learns to swim|a team loses a game
the harvest is poor|an old toy is found|a wish comes true|a journey begins|two friends have a fight
someone is late|a treasure is found|a tree is cut down"""
)

TOPICS = _entries(
    """rain|snow|the wind|rainbows|the moon|the sun|the stars|the sea|rivers|mountains|volcanoes|clouds|thunder|ice
fire|the seasons|day and night|soil|sand|rocks|trees|flowers|seeds|grass|mushrooms|bees|birds|fish|whales
spiders|ants|cats|dogs|horses|cows|chickens|frogs|snakes|bears|bats|butterflies|bread|milk|cheese|butter
honey|salt|sugar|rice|apples|potatoes|eggs|chocolate|tea|coffee|soup|bones|the heart|teeth|sleep|dreams
breathing|the brain|the skin|eyes|ears|hair|muscles|a cold|fever|running|swimming|bicycles|trains|boats
airplanes|cars|bridges|roads|houses|windows|clocks|mirrors|magnets|paper|glass|wood|iron|gold|wool|cotton
plastic|soap|candles|batteries|light|sound|heat|electricity|telephones|computers|radios|cameras|maps|money
markets|schools|libraries|hospitals|farms|cities|villages|families|friendship|music|painting|dancing|writing
reading|stories|games|football|chess|gardens|kitchens|holidays|winter|summer|autumn|spring|gravity|shadows
echoes|bubbles|ropes|wheels|pumps|kites|balloons|ships|lighthouses|deserts|forests|lakes|islands|caves
the wind mill|wells|fishing|baking|sewing|washing|recycling|waste|clean water|clean air|weather reports
calendars|letters|newspapers|museums|the post|kindness|courage|honesty|patience|anger|fear|trust|work|rest
luck|habits|memory|learning|mistakes"""
)

HOW_TO = _entries(
    """make tea|bake bread|plant a tree|wash a dog|ride a bicycle|clean a window|cook rice|boil an egg|paint a wall
mend a sock|write a letter|make a new friend|say sorry|learn a song|grow tomatoes|build a snowman|fly a kite
pack a suitcase|sleep well|make soup|read a map|feed birds in winter|care for a cat|save money|learn to swim
make a salad|keep a room tidy|find a lost thing|get over a cold|train a puppy|make a paper boat|tell a story
be a good guest|wrap a gift|take a good photograph|start a garden|cross a road safely|make pancakes
fix a flat tyre|study for a test|calm down|give a short speech|choose a book|listen well|plan a picnic
wash dishes|iron a shirt|light a camp fire safely|make a bed"""
)

LETTERS = _entries(
    """to thank someone for a gift|to invite a friend to a party|to say sorry for being late
to tell about a holiday|to ask for advice|to tell about a new school|to cheer up a sick friend
to describe a new house|to ask for help on the farm|to say goodbye|to tell about a new pet|to plan a visit
to congratulate someone|to tell about a storm|to share a recipe|to ask about an old friend|to tell good news
to tell sad news|to return a borrowed book|to complain about noise, politely|to thank a teacher
to tell about a first day at work|to ask a neighbour to water the plants|to tell about a walk
to describe the first snow|to recommend a book"""
)

READERS = ["Grandma", "Grandpa", "Mum", "Dad", "Aunt Rose", "Uncle Bill", "Mrs. Green", "Mr. Brown", *NAMES[:40]]

STARTS = [
    "Once upon a time, there was",
    "Once upon a time, in {place},",
    "One day, {name}",
    "One morning, {name}",
    "{name} was",
    "{name} and {other} were",
    "It was a cold morning, and {name}",
    "It was late, and {name}",
    "Long ago, in {place},",
    "There once lived",
    "Every evening, {name}",
    "In {place}, there was",
    "On the last day of summer, {name}",
    "When {name} was young,",
    "Nobody knew why",
    "The rain had stopped when {name}",
    '"Wait for me!" called {name}.',
    "",
    "",
    "",
]

LETTER_STARTS = [
    "I hope you are well.",
    "Thank you for",
    "I am writing to",
    "How are you?",
    "Do you remember",
    "Yesterday",
    "It has been a long time since",
    "I am so happy",
    "I am sorry",
    "I have some news.",
    "You will not believe",
    "We are all",
    "Last week",
    "Could you",
]

TALK_STARTS = [
    "{name}: Hello, {other}!",
    "{name}: Did you",
    "{name}: I think",
    "{name}: What",
    "{name}: Can you",
    "{name}: Look,",
    "{name}: Have you",
]

SCENE_STARTS = [
    '"Look at',
    '"What',
    '"I',
    '"Do you',
    '"Have you',
    "{name} looked at",
    "{name} and {other} sat",
    "{name} came into",
    '"{other}," said {name}. "Do',
]

STYLES = _entries(
    """Use simple words.|Use short sentences.|Write for young children.|Give it a happy ending.
Let it end with a lesson.|Let the people speak.|Write it in the first person.|Make it funny.
Make it a little sad.|Give it a surprise at the end.|Tell it calmly.|Write three short paragraphs.
Write two paragraphs.|"""
)


@dataclass(frozen=True)
class Prompt:
    """What is asked, and how the answer has to begin."""

    text: str
    beginning: str = ""


def prompts(random: Random) -> Iterator[Prompt]:
    """Prompts without end: half of them for stories."""
    kinds = [_story] * 10 + [_explanation] * 3 + [_how_to] + [_question] * 2 + [_letter] + [_talk] * 2
    while True:
        yield random.choice(kinds)(random)


def _story(random: Random) -> Prompt:
    who = random.choice([*PEOPLE, *ANIMALS, *ANIMALS])
    name, other = random.sample(NAMES, 2)
    place, thing, event = random.choice(PLACES), random.choice(THINGS), random.choice(EVENTS)
    feeling, style = random.choice(FEELINGS), random.choice(STYLES)
    about = random.choice(
        [
            f"{who} and {thing} in {place}",
            f"{name}, who is {feeling}, and {thing}",
            f"{who} in {place}, where {event}",
            f"{name} and {other}, who find {thing} in {place}",
            f"{who} who is too {feeling}",
            f"{name} and {who}. In the story {event}",
            f"how {name}, who is {feeling}, meets {who} in {place}",
            f"{name}. In the story {event} and {other} helps",
        ]
    )
    start = random.choice(STARTS).format(name=name, other=other, place=place)
    return Prompt(f"Write a short story about {about}. {style}".strip(), start)


def _explanation(random: Random) -> Prompt:
    topic, other = random.sample(TOPICS, 2)
    name = random.choice(NAMES)
    ask = random.choice(
        [
            f"Explain {topic} to a child.",
            f"Tell me something simple about {topic}.",
            f"Write a short, simple text about {topic}.",
            f"Write one paragraph about {topic} for a school book.",
            f"Why does {topic} matter to people?",
            f"What should everyone know about {topic}?",
            f"What do {topic} and {other} have in common?",
            f"Describe {topic} to someone who has never heard of it.",
            f"{name} asks about {topic}. Answer in a few short sentences.",
        ]
    )
    return Prompt(ask)


def _how_to(random: Random) -> Prompt:
    task, style = random.choice(HOW_TO), random.choice(["Use simple words.", "Use short sentences.", ""])
    ask = random.choice(
        [f"How do I {task}?", f"Explain to a child how to {task}.", f"Tell me in one paragraph how to {task}."]
    )
    return Prompt(f"{ask} {style}".strip(), random.choice(["", "First,", f"To {task},"]))


def _question(random: Random) -> Prompt:
    place, thing, topic = random.choice(PLACES), random.choice(THINGS), random.choice(TOPICS)
    who, feeling = random.choice(PEOPLE), random.choice(FEELINGS)
    ask = random.choice(
        [
            f"What can you see in {place}?",
            f"Describe {place} in the {random.choice(['morning', 'evening', 'winter', 'summer', 'rain'])}.",
            f"What does {who} do all day?",
            f"What would you do with {thing}?",
            f"What should I do when I feel {feeling}?" if " " not in feeling else "What helps when one is afraid?",
            f"Why do people like {topic}?",
            f"What is the best thing about {topic}?",
            f"Describe {thing} in a few sentences.",
            f"What is it like to be {who}?",
        ]
    )
    return Prompt(f"{ask} Answer in simple sentences.")


def _letter(random: Random) -> Prompt:
    reader, name = random.choice(READERS), random.choice(NAMES)
    why = random.choice(LETTERS)
    first = random.choice(LETTER_STARTS)
    return Prompt(f"Write a short letter from {name} to {reader}, {why}.", f"Dear {reader},\n\n{first}")


def _talk(random: Random) -> Prompt:
    name, other = random.sample(NAMES, 2)
    about = random.choice([random.choice(THINGS), random.choice(TOPICS), f"a day in {random.choice(PLACES)}"])
    if random.random() < 0.5:
        ask = f"Write a short conversation between {name} and {other} about {about}."
        return Prompt(ask, random.choice(TALK_STARTS).format(name=name, other=other))
    ask = f"Write a short scene in which {name} and {other} talk about {about}. Use quotation marks."
    return Prompt(ask, random.choice(SCENE_STARTS).format(name=name, other=other))
