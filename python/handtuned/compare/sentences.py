"""English sentences to embed: short and long, so that a batch has the padding that real batches have."""

SENTENCES = (
    "The kettle is boiling.",
    "Where did you park the car?",
    "Rain is expected in the afternoon, with clear skies by nightfall.",
    "She sold the bakery to her nephew and moved to a village by the sea.",
    "Please return the signed form before Friday.",
    "The committee postponed its vote because three members were stuck on a delayed train.",
    "Bread keeps longer in a paper bag than in plastic, but it dries out faster.",
    "How many lakes are there in Finland?",
    "A solar panel on this roof would pay for itself in about nine years, assuming that the price of electricity "
    "stays where it is and that nobody plants a tall tree on the southern side of the garden.",
    "He laughed so hard that he spilled his coffee over the keyboard.",
    "The museum is closed on Mondays.",
    "Our flight was cancelled, so we spent the night in a small hotel next to the harbour and took the first ferry "
    "in the morning.",
    "Turn left at the second traffic light, then follow the river until you see the old mill.",
    "The patient was given a low dose of aspirin and asked to come back in two weeks.",
    "Good pasta needs salt, time and attention.",
    "Nobody had noticed that the clock above the station entrance had been running four minutes slow since spring, "
    "which explained why so many commuters watched their train leave without them.",
    "Can I change my password without calling the help desk?",
    "The second violin came in a bar too early.",
    "Wolves were seen near the northern border for the first time in eighty years.",
    "If the pump loses pressure, close the red valve first, wait until the gauge has dropped below two bar, and only "
    "then open the drain; doing it the other way round floods the boiler room.",
    "I would rather walk.",
    "The court held that a tenant who repairs the roof at his own expense may deduct a reasonable sum from the rent.",
    "Yesterday's match ended in a draw after the goalkeeper saved a penalty in the last minute.",
    "The library lends out tools as well as books: drills, ladders, even a sewing machine.",
    "Her thesis deals with the migration of eels.",
    "Sorting the list first makes the search much faster, at the price of a little memory.",
    "After the storm, volunteers cleared the fallen branches from the cemetery, repaired the fence along the road, "
    "and set up long tables in the churchyard, where everybody who had helped was served soup, bread and a glass of "
    "the vicar's surprisingly strong cider.",
    "The battery lasts two days.",
    "Interest rates rose by a quarter of a point, as most analysts had predicted.",
    "My grandmother kept bees behind the barn and sold the honey at the Saturday market.",
    "The telescope recorded a faint signal from a galaxy whose light had set out long before the Earth existed.",
    "Is this seat taken?",
)
