"""The exception tree. The command line turns every ``DecantError`` into one line and exit code 2.

DecantError
├── ConfigError          a config or an option is wrong; nothing was started
├── CorpusError          the documents cannot be found or read, or there are none
├── TeacherError         the teacher cannot give what was asked of it
├── StudentError         the student, its checkpoint or its launcher cannot go on
└── StoreError           something about a store's directory
    ├── NotFinishedError     it has no manifest yet
    ├── UnavailableError     storage failed for now: the same may work later
    ├── FormatError          it is not ours, or of another format version
    ├── CorruptError         bytes that do not match their checksum
    └── IdentityError        it was made from something else
"""


class DecantError(Exception):
    """An error that the user can act on: what came, what is allowed, what to do."""


class ConfigError(DecantError, ValueError):
    """A config file or a command-line option is wrong."""


class CorpusError(DecantError):
    """The corpus cannot be read, or holds nothing."""


class TeacherError(DecantError):
    """The teacher model cannot score what was asked."""


class StudentError(DecantError):
    """The student cannot be built, trained or resumed."""


class StoreError(DecantError):
    """Something is wrong with a store's directory."""


class NotFinishedError(StoreError):
    """The store has no manifest: the job that writes it has not ended."""


class UnavailableError(StoreError):
    """Storage did not answer, or failed in a way that may pass."""


class FormatError(StoreError):
    """Not a store, or one of a version that this code does not know."""


class CorruptError(StoreError):
    """A file's bytes do not match its checksum."""


class IdentityError(StoreError):
    """The store was made from something else than what is asked for."""
