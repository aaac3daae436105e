"""Runs that are disturbed for real: signals, kills, flipped bits, full disks, stuck peers.

COVERED: the 25 faults of the house's list, and the tests that inject them. tests/faults/test_all.py looks whether they are there.
"""

COVERED = {
    1: ("SIGTERM, one process", "tests/faults/test_preempted.py::test_sigterm_saves_and_the_same_command_continues"),
    2: ("SIGTERM, one of two", "tests/faults/test_preempted.py::test_sigterm_to_one_of_two_stops_both_at_one_step"),
    3: ("kill -9 during saves", "tests/faults/test_killed.py::test_killed_at_random_times_it_ends_with_the_same_weights"),
    4: ("the end, with a save in flight", "tests/test_saving.py::test_a_save_in_flight_is_finished_however_the_run_ends"),
    5: ("a flipped bit", "tests/faults/test_damaged.py::test_any_flipped_bit_is_noticed_and_the_step_before_is_taken"),
    6: ("files cut, empty, missing, foreign", "tests/faults/test_damaged.py::test_a_damaged_run_goes_back_or_says_why_not"),
    7: ("another mesh", "tests/faults/test_damaged.py::test_a_state_goes_on_on_any_mesh"),
    8: ("interrupted at five steps", "tests/faults/test_preempted.py::test_interrupted_at_five_steps_bit_for_bit"),
    9: ("meshes and micro-batches", "tests/test_program.py::test_loss_and_every_gradient_are_the_same_on_every_mesh"),
    10: ("resumed within an epoch", "tests/test_mixture.py::test_random_access_is_the_sequence"),
    11: ("other data", "tests/test_train.py::test_changed_data_and_another_tokenizer_are_refused_and_change_nothing"),
    12: ("NaN", "tests/faults/test_numbers.py::test_skipped_steps_are_named_counted_over_restarts_and_end_the_run"),
    13: ("a loss that jumps", "tests/faults/test_numbers.py::test_a_jump_is_warned_of_in_a_run"),
    14: ("kill -9 of one of two", "tests/faults/test_killed.py::test_one_of_two_killed_ends_the_other"),
    15: ("a peer that is stuck", "tests/faults/test_stuck.py::test_a_stuck_peer_ends_the_run_and_is_named"),
    16: ("a peer that is missing or another", "tests/test_cluster.py::test_not_all_came"),
    17: ("a full disk", "tests/faults/test_disk.py::test_a_disk_that_fills_up"),
    18: ("a workdir that cannot be", "tests/faults/test_disk.py::test_a_workdir_that_cannot_be_is_a_sentence_before_anything_runs"),
    22: ("configs", "tests/faults/test_configs.py::test_no_mutation_of_a_config_is_a_traceback"),
    23: ("another version's checkpoint", "tests/test_checkpoint.py::test_other_arrays_are_refused_by_name_and_another_dtype_is_said"),
    25: ("secrets", "tests/faults/test_secrets.py::test_no_secret_is_written_down"),
}  # fmt: skip
