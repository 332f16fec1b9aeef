//! What breaks pipelines that read Postgres, each as a case of its own. The numbers are those of the
//! list of provocations that the project keeps. Those whose names begin with `long` take minutes, and gigabytes
//! of disk: they run with `make provocations`, and `make test` names them as ignored.
//!
//! | number | provoked | case |
//! | --- | --- | --- |
//! | 1, 2 | kill -9 under load, also between acknowledgement and confirmation | `restart::nothing_is_lost_or_doubled_when_it_is_killed_under_load`, `torture` |
//! | 3, 4 | Postgres stops, at once and in order | `restart::it_goes_on_when_postgres_restarts_and_crashes`, `torture` |
//! | 5 | its connections are terminated again and again | `slot::terminated_again_and_again_it_goes_on` |
//! | 6 | frozen beyond the time-out | `wires::frozen_beyond_the_time_out_it_takes_the_slot_again`, `torture` |
//! | 7 | the sink stalls for longer than the time-out | `sink_faults::postgres_is_answered_while_the_sink_stands_still` |
//! | 8 | black holes, resets, half-closed wires, single bytes | `wires::a_bad_wire_to_postgres_loses_and_doubles_nothing`, `torture` |
//! | 9 | writes that are not published | `slot::writes_that_are_not_published_do_not_pin_the_log` |
//! | 10 | a transaction that has written and is left open | `log::a_transaction_that_is_left_open_is_named_with_its_process` |
//! | 11 | more log kept than the server allows | `log::a_slot_that_the_server_gave_up_is_named_with_its_mend` |
//! | 12 | the slot dropped, or advanced by somebody else | `slot::a_slot_that_was_advanced_or_dropped_is_refused` |
//! | 13 | the publication dropped and made anew | `slot::a_publication_that_was_made_anew_…` |
//! | 14 | names in mixed case, with quotes and dots | `rows::names_are_taken_letter_for_letter` |
//! | 15 | what is missing on the server | `bad_input` |
//! | 16 | two processes | `restart::a_second_process_takes_over_only_when_the_first_is_gone` |
//! | 17 | large rows | `sizes::large_rows_are_parked_and_the_others_go_on`, `sizes::long_a_row_of_300_mib_is_parked_and_the_others_go_on` |
//! | 18 | a large transaction | `sizes::a_large_transaction_needs_no_more_memory_than_a_small_one` |
//! | 18 | a million small transactions | `sizes::long_a_million_transactions_need_no_more_memory_than_a_few` |
//! | 18 | many subtransactions | `transactions::subtransactions_that_are_rolled_back_leave_nothing` |
//! | 19, 21, 27 | unchanged large values, keys of every form, partitions, truncates | `verify::a_stream_is_compared_while_rows_change`, `restart`, `torture` |
//! | 20 | DDL between and inside transactions, a table made anew | `rows::each_change_is_read_by_the_tables_shape_of_its_time` |
//! | 22, 24 | every type, under settings of the role that spoil them | `values` |
//! | 23 | values that parsers refuse, bytes that are no text | `sizes` |
//! | 25 | transforms that trap, loop or swap inside a transaction | `transforms` |
//! | 28 | prepared transactions across a restart | `transactions::prepared_transactions_come_once_or_never` |
//! | 29 | logical messages | `transactions::logical_messages_become_no_records` |
//! | 30 | a transaction that is open when the slot is made | `slot::the_transaction_that_blocks_a_new_slot_is_named` |
//! | 31 | a full disk, then room | `spill::a_full_disk_is_said_and_outlasted`, `torture` |
//! | 32 | older data of the server put back | `log::an_older_copy_of_the_servers_data_is_refused` |
//! | 33 | row filters and column lists | `rows::a_row_that_crosses_a_filter_is_born_or_dies` |
//! | 34 | the server's clock goes back | `clock::order_does_not_rest_on_the_servers_clock` |
//! | 34 | the pipeline's own goes back and jumps ahead | `clock::nothing_waits_for_the_pipelines_own_clock` |
//! | 35 | a random mix | `torture` |
//!
//! Not here: 26, as there is no backfill.

mod clock;
mod log;
mod rows;
mod sizes;
mod slot;
mod transactions;
mod wires;
