//! Decoders of others, none of whose panics go further than here.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use crate::{Error, Result};

thread_local! {
    /// Whether this thread runs a decoder, whose panic is not to be printed.
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Runs a decoder. If it panics, nothing is printed and the message is in the error.
///
/// # Errors
///
/// Those of the decoder, and [`Error::Decoder`].
pub(super) fn contained<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = take_hook();
        set_hook(Box::new(move |panic| {
            if !CONTAINED.get() {
                print(panic);
            }
        }));
    });
    CONTAINED.set(true);
    // Whatever a decoder left half done goes away with it.
    let done = catch_unwind(AssertUnwindSafe(work));
    CONTAINED.set(false);
    done.unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<&str>().map(ToString::to_string);
        let words = words.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(Error::Decoder { why: words.unwrap_or_else(|| "it did not say why".into()) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_in_words() {
        let error = contained::<()>(|| panic!("at pixel {}", 7)).unwrap_err();
        assert!(matches!(error, Error::Decoder { .. }));
        assert!(error.to_string().contains("at pixel 7"), "{error}");
        assert!(!CONTAINED.get(), "later panics are printed");
        assert_eq!(contained(|| Ok(1)).unwrap(), 1);
    }
}
