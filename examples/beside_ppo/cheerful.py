"""A judge that only counts words: different cheerful ones less different gloomy ones."""

import re

CHEERFUL = set(
    "happy smiled smile laughed fun love loved friend friends hug hugged kind nice good best great "
    "play played sing sang dance danced sun flower flowers cake gift proud thank thanked share "
    "shared helped help wonderful beautiful glad excited safe warm".split()
)
GLOOMY = set(
    "sad cried cry angry mad scared afraid bad hurt lost alone mean yelled broke broken fell dark "
    "sick pain hate hated worried sorry cold fight fought shout shouted stole dead".split()
)


def cheerful(prompts, responses, rows):
    words = [set(re.findall(r"[a-z]+", response.lower())) for response in responses]
    return [float(len(some & CHEERFUL) - len(some & GLOOMY)) for some in words]
