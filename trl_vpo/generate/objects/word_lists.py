"""English words by kind, with which `nouns.py` tags text: lower case, not complete."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ABBREVIATIONS = _words("mr mrs ms dr st prof jr sr vs etc e.g i.e approx inc")
STANDALONE = _words("one two three four five another some each both all many several few most this these those either")
DETERMINERS = STANDALONE | _words(
    "a an the that his her its their my your our any every no more less much neither six seven eight nine ten eleven "
    "twelve dozen dozens hundred hundreds thousand thousands countless numerous multiple various half"
)
PREPOSITIONS = _words(
    "of in on at by with from into onto over under above below behind beside besides between among amongst near next "
    "around across along through against beneath underneath inside outside toward towards upon within without about "
    "off out up down during past beyond for as like than including featuring via per except despite"
)
COPULAS = _words(
    "is are was were be been being looks look appears appear seems seem feels feel becomes become remains"
)
OTHERS = COPULAS | _words(
    "i you he she it we they me him us them who whom whose which what where when why how there here itself himself "
    "herself themselves ourselves yourself myself someone somebody something anyone anybody anything everyone "
    "everybody everything nobody nothing none others hers theirs mine ours yours am 's 're 've 'll 'd 'm do does did "
    "done have has had having will would can could may might must shall should don't doesn't didn't isn't aren't "
    "wasn't weren't can't couldn't won't wouldn't to not or but nor so yet if while because although though since "
    "unless until whether also too very quite rather just only even still already again often always never sometimes "
    "perhaps maybe however therefore moreover furthermore meanwhile overall additionally together apart away forward "
    "backward ahead nearby indoors outdoors altogether almost now then once else instead well yes please thus hence "
    "etc ago far soon later earlier today together upright sideways downwards upwards forwards backwards"
)
ADJECTIVES = _words(
    "red green blue yellow white black brown gray grey purple pink orange beige tan navy maroon teal turquoise golden "
    "silver cream dark light-colored bright pale colorful colourful vibrant striped spotted plaid big large small "
    "little tiny huge giant tall short long wide narrow thick thin high low round oval curved flat sharp old new "
    "young modern ancient vintage antique rustic wooden woolen soft hard wet dry hot cold warm cool fresh clean dirty "
    "clear cloudy sunny shiny fluffy furry hairy bare empty full open close happy sad calm serene peaceful busy "
    "lively cozy comfortable beautiful pretty lovely nice good great fine heavy gentle wild green-colored lush dense "
    "steep rocky sandy snowy grassy dusty rusty rainy foggy leafy leather double single visible available alone "
    "asleep awake ready able sure similar different same other own main first second third last final whole entire "
    "certain such particular specific overall general simple complex real plain rich deep blurry elderly casual "
    "formal traditional typical local public private urban rural tropical natural electric medium average many-colored"
)
# Adjectives that no detector can see; they fall out of a phrase.
UNSEEN = _words(
    "visible available similar different same other own main first second third last final whole entire certain such "
    "particular specific overall general typical nice good great fine real average beautiful lovely pretty able sure "
    "left right"
)
# Verbs as they come in captions and questions, where the plain or the -s form is more often a verb than a noun.
VERBS = _words(
    "sit stand wear hold ride walk run lie lay rest lean eat drink carry show display feature depict include contain "
    "describe explain tell identify provide list give write read say make take get go come see look watch gaze stare "
    "smile laugh enjoy prepare seem appear suggest indicate create add surround cover fill hang play perform throw "
    "catch kick hit jump leap swim fly float sleep drive pull push reach point pose gather engage participate use try "
    "want need know think help work wait talk speak sing dance cook serve chop consist belong extend stretch face "
    "overlook occupy capture portray represent illustrate convey imply reveal highlight emphasize enhance contribute "
    "evoke resemble roam graze perch climb crawl chase follow lead bring put place keep leave move turn bend raise "
    "lift grab touch hug kiss greet wave share blend complement create adorn decorate line connect separate divide "
    "happen occur exist blow let find count answer determine allow require feel become remain continue begin start"
)
PAST = _words(
    "sat stood wore worn held rode ridden ran lay lain laid ate eaten drank drunk showed shown gave given wrote "
    "written said made took taken got gone went came seen hung threw thrown caught swam flew flown slept drove driven "
    "spoke spoken sang sung led brought kept left moved bent built lit set put felt found told known grew grown blew "
    "blown drew drawn broke broken chose chosen spread stuck swung lost met paid sold sent shot torn frozen fallen "
    "cut hidden woven sewn strewn bound wound"
)
ING_NOUNS = _words(
    "building painting ceiling clothing railing wing ring string king swing earring evening morning lighting awning "
    "wedding drawing thing spring sling crossing landing topping icing frosting stuffing pudding dumpling seedling "
    "duckling sibling sterling carving siding flooring roofing writing marking covering seating setting surrounding"
)
ING_MODIFIERS = _words(
    "dining parking living swimming frying cutting washing sewing baking hiking shopping fishing ironing rolling "
    "rocking racing running serving mixing measuring boxing skiing riding landing sleeping waiting vending boarding"
)
ED_NOUNS = _words("bed shed sled seed weed reed steed speed breed feed flatbed flowerbed seabed bobsled moped biped")
LY_NOUNS = _words("family butterfly dragonfly fly belly jelly lily bully ally assembly doily anomaly holly dolly")
ABLE_NOUNS = _words("table cable vegetable stable timetable turntable collectible bible crucible handful mouthful")
NO_ADVERBS = LY_NOUNS | ADJECTIVES  # though they end in "ly"
# Heads that are no object in the picture: about the picture, places in it, parts of it, quantities, thoughts.
SKIPPED = _words(
    "image picture photo photograph photography video clip frame screenshot shot scene background foreground view "
    "overview close-up closeup viewer caption description detail question answer response statement sentence word "
    "name text title thing object item subject element feature aspect side left right top bottom middle center centre "
    "corner edge front back end rear position place location area region space part portion section spot direction "
    "distance perspective angle color colour shape size style type kind sort form pattern texture shade hue tone "
    "number amount way lot bit variety range series level time day moment hour minute season year date occasion event "
    "activity action interaction atmosphere mood ambiance ambience sense feeling impression emotion focus attention "
    "contrast presence appearance arrangement composition layout context setting environment surrounding surroundings "
    "weather life purpose reason cause effect fact idea concept theme story example case chance role task job work "
    "process step method result hint clue interest beauty charm elegance warmth depth height width length weight "
    "speed movement order manner mind choice mix analysis fun leisure pleasure safety help need rest plenty majority"
)
# Before "of", these only count or gather what follows.
GATHERERS = _words(
    "group pair couple bunch set row stack pile piece slice number variety kind type lot series collection array herd "
    "flock crowd line cluster handful assortment selection layer bit part top side front back dozen team pack swarm"
)
ABSTRACT = ("tion", "sion", "ness", "ment", "ity", "ance", "ence", "ism", "ship", "hood", "ology", "ability")
CONCRETE = _words(
    "station pavement basement apartment monument instrument equipment ornament garment city university ambulance "
    "fence appliance entrance vegetation decoration intersection plantation television cushion mansion compartment "
    "condiment parchment ship battleship spaceship steamship residence cement document parliament"
)
