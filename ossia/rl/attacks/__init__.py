"""Programs and answers that cheat, tried on an environment: each must earn nothing, and touch nothing outside.

```text
programs/CLASS/NAME.txt -> Attack --Target.turns--> turns --judged as a model's--> reward     in a process of its own,
Outside: canary files, sockets, processes, the judge's own state   --afterwards--> touched    replaced if it falls
```
A new attack is one small file; `corpus` says what stands in it.
"""

from ossia.rl.attacks.corpus import PROGRAMS, Attack, read_attacks
from ossia.rl.attacks.run import Report, Result, attack
from ossia.rl.attacks.table import as_text

__all__ = ["PROGRAMS", "Attack", "Report", "Result", "as_text", "attack", "read_attacks"]
