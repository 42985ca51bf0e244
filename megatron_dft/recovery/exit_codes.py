"""What the exit statuses of training and of finetune.sbatch mean, after sysexits.h where one fits.

torchrun reports every failure of a worker as 1, so the run also leaves a word in the file that
$MEGATRON_DFT_STATUS names; status.py writes it and finetune.sbatch reads it.

| status | word | meaning | finetune.sbatch |
|---|---|---|---|
| 0 | finished | all steps done, exports written | success marker |
| 2 | refused | a wrong flag, or a resume that would not be the same run | stops |
| 65 | bad-numbers | NaN or inf in the loss or the gradients; nothing was updated | stops |
| 69 | hang | no progress within --hang-timeout | requeues |
| 70 | – | finetune.sbatch: crash after crash without a new checkpoint | stops |
| 75 | stopped | asked to stop; a checkpoint is written, the run may go on | requeues |
| 130 | – | a second signal forced the exit; nothing was saved | as a crash |
"""

FINISHED = 0
REFUSED = 2
BAD_NUMBERS = 65
HANG = 69
CRASH_LOOP = 70
STOPPED = 75
FORCED = 130
