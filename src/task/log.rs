//! How a line of our log tells which task it is about.

/// An event about a task, with the fields by which operators find it in the agent's log; `journalctl -u` finds it by `unit`.
macro_rules! of_task {
    ($level:ident, $names:expr, $unit:expr, $($rest:tt)+) => {
        ::tracing::$level!(
            alloc_id = %$crate::text::UnitText::new(&$names.alloc_id),
            task = %$crate::text::UnitText::new(&$names.task),
            unit = %$unit,
            $($rest)+
        )
    };
}

pub(crate) use of_task;
