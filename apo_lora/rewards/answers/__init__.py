"""Reading answers out of text and comparing them, without torch.

| module | what it holds |
|---|---|
| `text.py` | where in a completion the final answer stands |
| `plain.py` | a text without its markup, one sign for each meaning |
| `readings.py` | what a final answer may say, from the literal to the loose |
| `denials.py` | words that take an answer back: negations, hedges, bounds |
| `letters.py`, `lists.py` | letters of options; lists, tuples, named values, intervals |
| `numbers.py`, `units.py` | numbers as people write them; units in several scripts, and their conversion |
| `same.py` | whether two texts say the same, and the rules that a recipe may loosen |
| `gold.py` | the gold answer made plain |
| `match.py` | a final answer against the gold, as far as cheap comparison goes |
| `mathematics.py` | what only mathematics can decide, by Math-Verify, behind guards |
"""
