//! Write a transform for Sluicebox.
//!
//! ```ignore
//! use sluicebox_transform::{Change, NoConfig, Transform, Verdict, export};
//!
//! struct Hide;
//!
//! impl Transform for Hide {
//!     type Config = NoConfig;
//!     fn new(_: NoConfig) -> Result<Self, String> {
//!         Ok(Self)
//!     }
//!     fn transform(&mut self, change: &Change) -> Result<Verdict, String> {
//!         change.remove("password")?;
//!         Ok(Verdict::Keep)
//!     }
//! }
//!
//! export!(Hide);
//! ```
//!
//! In `Cargo.toml`, `[lib] crate-type = ["cdylib"]` and this crate; then
//! `cargo build --release --target wasm32-unknown-unknown`, and copy the `.wasm` file into the
//! transforms folder. No further tool is needed.
//!
//! Tests of a transform need no WebAssembly: built for the machine itself, [`Change`] is one in
//! memory, with the same functions. `make` takes the settings as the settings file has them:
//!
//! ```
//! # use sluicebox_transform::{Change, NoConfig, Transform, Verdict};
//! # struct Hide;
//! # impl Transform for Hide {
//! #     type Config = NoConfig;
//! #     fn new(_: NoConfig) -> Result<Self, String> { Ok(Self) }
//! #     fn transform(&mut self, change: &Change) -> Result<Verdict, String> {
//! #         change.remove("password")?;
//! #         Ok(Verdict::Keep)
//! #     }
//! # }
//! use sluicebox_transform::{Action, make};
//!
//! let change = Change::new(Action::Insert, "public", "users")
//!     .with_key("id", "int4", "1")
//!     .with("password", "text", "\"secret\"");
//! let mut hide: Hide = make("{}").unwrap();
//! hide.transform(&change).unwrap();
//! assert!(!change.message().unwrap().contains("secret"));
//! ```
//!
//! A panic costs only the message that caused it, and its text is shown with that message. The
//! types are those of `wit/transform.wit`, where each function is described.

// The generated code names this crate from the outside, because it does so in its users too.
extern crate self as sluicebox_transform;

use serde::Deserialize;
use serde::de::DeserializeOwned;

#[doc(hidden)]
pub mod bindings {
    #![allow(missing_docs, reason = "generated from the WIT, which is documented itself")]
    wit_bindgen::generate!({
        path: "../../wit",
        world: "transform",
        pub_export_macro: true,
        default_bindings_module: "sluicebox_transform::bindings",
        export_macro_name: "export_world",
        runtime_path: "sluicebox_transform::wit_bindgen::rt",
    });
}

#[doc(hidden)]
pub use {serde, serde_json, wit_bindgen};

pub mod schema;

#[cfg(not(target_family = "wasm"))]
mod native;

pub use bindings::Verdict;
pub use bindings::sluicebox::transform::logging::Level;
#[cfg(target_family = "wasm")]
pub use bindings::sluicebox::transform::logging::log;
#[cfg(target_family = "wasm")]
pub use bindings::sluicebox::transform::types::Change;
pub use bindings::sluicebox::transform::types::{Action, Algorithm, Codec, Column};
#[cfg(not(target_family = "wasm"))]
pub use native::{Change, log, take_logs};

/// What shapes messages. One value is made for each instance of the module, and sees many changes.
pub trait Transform: Sized + 'static {
    /// The settings file's table `config`. Declare it by [`settings!`], and Sluicebox knows which keys
    /// there are: it refuses a misspelt one by its line, and `transforms inspect` shows them. Any type
    /// of `serde`'s will do as well; use `#[serde(deny_unknown_fields)]` then, so that a misspelt key
    /// is refused instead of ignored.
    type Config: DeserializeOwned;

    /// Takes the settings.
    ///
    /// # Errors
    ///
    /// With a sentence that says what to mend: the module then does not go live.
    fn new(config: Self::Config) -> Result<Self, String>;

    /// Shapes one message.
    ///
    /// # Errors
    ///
    /// With a sentence for the operator: this message then fails.
    fn transform(&mut self, change: &Change) -> Result<Verdict, String>;
}

/// The settings of a transform that has none.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoConfig {}

/// Makes a [`Transform`] the module's. Where no WebAssembly is built it does nothing, so that the
/// transform's tests are ordinary ones.
#[macro_export]
macro_rules! export {
    ($transform:ty) => {
        // So that it counts as used there, too.
        const _: fn(&str) -> ::core::result::Result<$transform, ::std::string::String> =
            $crate::make::<$transform>;
        #[cfg(target_family = "wasm")]
        const _: () = {
            #[allow(
                unused_imports,
                reason = "where the settings are described, they say so themselves"
            )]
            use $crate::schema::Undescribed as _;

            const SCHEMA: ::core::option::Option<&$crate::schema::Schema> =
                $crate::schema::Probe::<<$transform as $crate::Transform>::Config>::FOUND;
            const LENGTH: usize = $crate::schema::length(SCHEMA);
            #[used]
            #[unsafe(link_section = "sluicebox:settings")]
            static SECTION: [u8; LENGTH] = $crate::schema::bytes::<LENGTH>(SCHEMA);

            // A module has one thread, but the language wants to be told.
            ::std::thread_local! {
                static TRANSFORM: ::core::cell::RefCell<::core::option::Option<$transform>> =
                    const { ::core::cell::RefCell::new(::core::option::Option::None) };
            }

            struct Module;

            impl $crate::bindings::Guest for Module {
                fn init(
                    config: ::std::string::String,
                ) -> ::core::result::Result<(), ::std::string::String> {
                    let made = $crate::start::<$transform>(&config)?;
                    TRANSFORM
                        .with(|transform| transform.replace(::core::option::Option::Some(made)));
                    ::core::result::Result::Ok(())
                }

                fn transform(
                    change: &$crate::Change,
                ) -> ::core::result::Result<$crate::Verdict, ::std::string::String> {
                    TRANSFORM.with(|transform| match &mut *transform.borrow_mut() {
                        ::core::option::Option::Some(transform) => {
                            $crate::Transform::transform(transform, change)
                        }
                        ::core::option::Option::None => ::core::result::Result::Err(
                            ::std::string::String::from("`init` was not called before"),
                        ),
                    })
                }
            }

    $crate::bindings::export_world!(Module with_types_in $crate::bindings);
        };
    };
}

/// [`make`], and from then on panics are logged.
#[doc(hidden)]
pub fn start<T: Transform>(config: &str) -> Result<T, String> {
    std::panic::set_hook(Box::new(|panic| log(Level::Error, &panic.to_string())));
    make(config)
}

/// Makes a transform from its settings as JSON text, as Sluicebox does it.
///
/// # Errors
///
/// With what is wrong with the settings.
pub fn make<T: Transform>(config: &str) -> Result<T, String> {
    let config = serde_json::from_str(config).map_err(|error| format!("`config`: {error}"))?;
    T::new(config)
}
