"""Checks that the fast suite catches fixed defects, each put back into a copy of src.

    python tests/tools/reverts.py            # all of reverts.toml
    python tests/tools/reverts.py 6a6344d    # entries of a commit

An entry has the commit that fixed the defect, a file of ``src/batchnorm`` with its text today
(``now``), the text that restores the defect (``then``), and tests of the fast suite that must fail.
"""

import sys
from pathlib import Path

import tomllib
from copies import copied, fails


def main() -> int:
    found = tomllib.loads(Path(__file__).with_name("reverts.toml").read_text())["revert"]
    missed = 0
    with copied() as source:
        for one in found:
            if sys.argv[1:] and one["commit"] not in sys.argv[1:]:
                continue
            path = source / "batchnorm" / one["file"]
            text = path.read_text()
            if text.count(one["now"]) != 1:
                raise SystemExit(f"{one['commit']}: not once in {one['file']}: {one['now']}")
            path.write_text(text.replace(one["now"], one["then"]))
            how = fails(source, [f"tests/{test}" for test in one["tests"]])
            path.write_text(text)
            missed += not how
            print(f"{how or 'MISSED'}: {one['commit']}  {one['what']}", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
