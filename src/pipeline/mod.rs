//! The path of a change, from the source to the confirmation.
//!
//! | file | what |
//! | --- | --- |
//! | `exactly_once` | why each change is in S2 once and in order: the whole argument |
//! | `driver` | the one task that owns a running pipeline |
//! | `workers` | the threads that run the transforms, and the size gate behind them |
//! | `outbox`, `link` | what is on its way to S2, and the line there |
//! | `grants` | what only an operator can know at a start |
//! | `crossing` | the order of a group whose messages go to different streams |
//! | `dead_letter` | a message whose attempts are spent, as it is handed on |
//! | `place` | where a record lies: its stream and its number |
//! | `ack` | what may be confirmed to Postgres |
//! | `group`, `holds` | which changes keep their order, and which wait in the store |
//! | `size_gate` | the only maker of a record that the sink takes |
//! | `sample`, `vetting` | what a chain is tried on before it goes live |
//! | `budget` | how much may be between the source and its settlement |
//! | `measures` | what is counted for `/metrics` |
//! | `pressure`, `wal` | what everything waits for lately; why Postgres keeps WAL |
//! | `stuck` | whether a part stands still although it has something to do |
//! | `heartbeat` | whether the driver itself does, seen from outside of it |
//! | `control` | what the console and the commands ask |

pub mod ack;
pub mod budget;
pub mod control;
pub mod crossing;
pub mod dead_letter;
pub mod driver;
pub mod exactly_once;
pub mod grants;
pub mod group;
pub mod heartbeat;
pub mod holds;
pub mod item;
pub mod link;
pub mod measures;
pub mod outbox;
pub mod place;
pub mod pressure;
pub mod sample;
pub mod size_gate;
pub mod stuck;
pub mod vetting;
pub mod wal;
pub mod workers;
