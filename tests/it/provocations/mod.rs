//! What breaks pipelines that read Postgres, each as a case of its own. The numbers are those of the
//! list of provocations that the project keeps; what is long runs in `make torture`.
//!
//! | number | provoked | case |
//! | --- | --- | --- |
//! | 1, 2 | kill -9 under load, also between acknowledgement and confirmation | `restart::nothing_is_lost_or_doubled_when_it_is_killed_under_load`, `torture` |
//! | 3, 4 | Postgres stops, at once and in order | `restart::it_goes_on_when_postgres_restarts_and_crashes`, `torture` |
//! | 5 | its connections are terminated again and again | `slot::terminated_again_and_again_it_goes_on` |
//! | 6, 8 | frozen beyond the time-out; black holes, resets, half-closed wires, single bytes | `torture` |
//! | 7 | the sink stalls for longer than the time-out | `sink_faults::postgres_is_answered_while_the_sink_stands_still` |
//! | 9 | writes that are not published | `slot::writes_that_are_not_published_do_not_pin_the_log` |
//! | 12 | the slot dropped, or advanced by somebody else | `slot::a_slot_that_was_advanced_or_dropped_is_refused` |
//! | 13 | the publication dropped and made anew | `slot::a_publication_that_was_made_anew_is_noticed` |
//! | 14 | names in mixed case, with quotes and dots | `rows::names_are_taken_letter_for_letter` |
//! | 15 | what is missing on the server | `bad_input` |
//! | 16 | two processes | `restart::a_second_process_takes_over_only_when_the_first_is_gone` |
//! | 18 | many subtransactions | `transactions::subtransactions_that_are_rolled_back_leave_nothing` |
//! | 19, 21, 27 | unchanged large values, keys of every form, partitions, truncates | `verify::a_stream_is_compared_while_rows_change`, `restart`, `torture` |
//! | 20 | DDL between and inside transactions, a table made anew | `rows::each_change_is_read_by_the_tables_shape_of_its_time` |
//! | 22, 24 | every type, under settings of the role that spoil them | `values` |
//! | 25 | transforms that trap, loop or swap inside a transaction | `transforms` |
//! | 28 | prepared transactions across a restart | `transactions::prepared_transactions_come_once_or_never` |
//! | 29 | logical messages | `transactions::logical_messages_become_no_records` |
//! | 30 | a transaction that is open when the slot is made | `slot::the_transaction_that_blocks_a_new_slot_is_named` |
//! | 33 | row filters and column lists | `rows::a_row_that_crosses_a_filter_is_born_or_dies` |
//! | 35 | a random mix | `torture` |
//!
//! Not here: 10, 11, 17 and 23 in part, 26 (there is no backfill), 31, 32 and 34.

mod rows;
mod slot;
mod transactions;
