"""The words that tests/test_language.py refuses or asks for."""

from __future__ import annotations

# What is read: folders and files of the repository.
READ = (
    "mmjax", "configs", "launch", "tests", "benchmarks", "notebooks", "docs",
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md",
)  # fmt: skip
# Where docstrings of Python begin with a sentence.
DOCUMENTED = ("mmjax", "benchmarks", "launch", "docs", "configs", "notebooks", "tests")
SUFFIXES = {".py", ".sh", ".md", ".ipynb"}

# Phrases that read as translated, each with what to write instead. Of Python, comments and strings are searched; code
# between backticks is not.
PHRASES = {
    r"mend(s|ed|ing)?": "fix, repair",
    r"aloud": "name the channel: printed, logged",
    r"anew": "again, from scratch",
    r"for ever": "forever, without end",
    r"in vain": "without success",
    r"besides": "also, in addition, apart from",
    r"manieth": "how many times",
    r"(a|the) person('s)?": "you, the user",
    r"(goes|go|going|went|gone) on": "continues, resumes, keeps doing",
    r"(says?|saying|said)": "prints, logs, reports, states, names",
    r"(tells?|telling|told)": "prints, logs, reports, shows, distinguishes",
    r"(speaks?|speaking|spoke)": "prints, logs, names",
    r"begins? at random": "is initialised randomly",
    r"(leaves?|leaving|left) out": "excludes, skips, omits",
    r"of one's own": "your own",
    r"once more": "again",
    r"(or|and) nobody": "none, no reader",
    r"otherwise than": "differently from",
}

# Lines that may hold such a phrase: (file, part of the line) -> reason.
ALLOWED_LINES: dict[tuple[str, str], str] = {}
ALLOWED_FILES = {
    "benchmarks/results": "measurements as they were written",
    "docs/results": "tables of benchmarks/results",
    "tests/golden": "runs and configs of older versions",
    "tests/extra/words.py": "it lists them",
    "tests/test_language.py": "it tests the check with them",
}

# A docstring never begins with these; see FIRST_VERBS for functions.
FRAGMENTS = frozenset(
    "After As At By For From How If In Of Over That To Until What When Where Whether Which Who Whom Whose Why "
    "With Within Without".split()
)

# A function's docstring begins with one of these, in the imperative. Add yours if it is a verb.
FIRST_VERBS = frozenset(
    """
    Accept Add Allow Announce Append Apply Assert Assign Attend Average Begin Bind Bound Build Cache Call Cast
    Check Clip Close Collect Compare Compile Compose Compute Concatenate Convert Copy Count Create Crop Cut
    Declare Decode Delete Describe Divide Do Draw Drop Embed Encode End Ensure Estimate Evaluate Execute Exit
    Expand Extract Fetch Filter Find Flush Fold Format Generate Get Give Group Hand Hint Hold Ignore Initialise
    Insert Interpolate Iterate Join Keep Lay Leave Let List Load Log Lower Make Mark Mask Match Measure Merge
    Move Multiply Normalise Note Open Pack Parse Pass Place Plan Prepare Print Project Put Raise Read Record
    Reduce Refuse Release Rematerialise Remove Rename Renew Replace Replay Report Require Resample Reset Reshape
    Resolve Restart Restore Resume Return Round Run Sample Save Scale Scan Scatter Select Send Set Shard Show
    Shuffle Silence Skip Sort Split Start Stop Store Sum Take Time Trace Train Transform Transpose Try Turn Undo
    Unpack Update Validate Verify Visit Wait Warn Wrap Write Yield
    Act Change Escape Hide Kill Request Rewrite Stand
    """.split()
)

# Names that mean nothing to a reader: use the thing itself (`results`, `table`, `cache`, `task`).
NAMES = frozenset("each own both rest more said found made told held given kept wanted".split())
