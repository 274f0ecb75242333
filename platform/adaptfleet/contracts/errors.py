"""The one exception tree.

AdaptfleetError            anything a user can mend; shown without a traceback
├── ContractError          a contract, a flag or an environment variable is wrong
├── DataError              rows that cannot be used, all of them, with line numbers
├── ModelError             a base model that cannot be loaded or does not fit what is asked
├── TrainingError          a run that cannot go on (workers that fail, a run folder of another contract)
│   └── DivergedError      its loss is no number; other settings from the same checkpoint may do
├── StoreError             the store cannot be read or written (a full disk, no credentials)
│   ├── NotFoundError      no such artifact, version or alias; names near matches
│   └── CorruptError       a file differs from its manifest's SHA-256
├── PublishError           an artifact that must not be published or promoted, with the reason and the alternative
└── ServingError           the endpoint or its engine cannot do what is asked

Every error takes one message and pickles: Ray ships exceptions between processes.
"""


class AdaptfleetError(Exception):
    """The fact, the value, what is allowed, the way out."""


class ContractError(AdaptfleetError):
    pass


class DataError(AdaptfleetError):
    pass


class ModelError(AdaptfleetError):
    pass


class TrainingError(AdaptfleetError):
    pass


class DivergedError(TrainingError):
    pass


class StoreError(AdaptfleetError):
    pass


class NotFoundError(StoreError):
    pass


class CorruptError(StoreError):
    pass


class PublishError(AdaptfleetError):
    pass


class ServingError(AdaptfleetError):
    pass
