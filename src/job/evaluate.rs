//! The two passes over a job's expressions. Reading the file settles `var.` and `local.`; everything else that is named
//! inside `${}` stays as text until a task runs, when [`RunTime`] knows its NOMAD_ variables. Pure.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::str::FromStr;

use hcl::eval::{Context, ErrorKind, Evaluate};
use hcl::expr::{Conditional, Expression, FuncCall, ObjectKey, Operation, Traversal};
use hcl::template::{Element, Template};
use hcl::{Identifier, Map, Value};

use super::JobError;

/// What can be named while the file is read.
#[derive(Debug, Default)]
pub(super) struct Names {
    variables: Map<String, Value>,
    locals: Map<String, Value>,
    /// Of all of them as text.
    bytes: usize,
    /// How much may have been made of them so far.
    made_bytes: Cell<usize>,
}

/// A file of some lines can double a text with each of them, and who looks at it is root.
const MAX_MADE_BYTES: usize = 64 << 20;

impl Names {
    pub fn set_variable(&mut self, name: String, value: Value) {
        self.bytes += value.to_string().len();
        self.variables.insert(name, value);
    }

    pub fn set_local(&mut self, name: String, value: Value) {
        self.bytes += value.to_string().len();
        self.locals.insert(name, value);
    }

    /// The value of an expression, with run-time names kept as `${name}`.
    pub fn evaluate(&self, expression: Expression) -> Result<Value, hcl::eval::Error> {
        let made = self.made_bytes.get().saturating_add(self.most(&expression));
        if made > MAX_MADE_BYTES {
            return Err(ErrorKind::Message(format!(
                "variables and locals make more than {} MiB of text; shorten them",
                MAX_MADE_BYTES >> 20
            ))
            .into());
        }
        self.made_bytes.set(made);
        let mut context = Context::new();
        context.declare_var("var", Value::Object(self.variables.clone()));
        context.declare_var("local", Value::Object(self.locals.clone()));
        keep(expression, &context)?.evaluate(&context)
    }
}

impl Names {
    /// No less than what an expression can come to: each mention of a name is all of them, and each `for` as many rounds.
    fn most(&self, expression: &Expression) -> usize {
        let text = expression.to_string();
        let mentions = text.matches("local").count() + text.matches("var").count();
        let named = mentions.saturating_mul(self.bytes);
        let loops = ["[for ", "{for ", "%{for ", "%{ for ", "%{~ for ", "%{~for "];
        let loops: usize = loops.iter().map(|mark| text.matches(mark).count()).sum();
        // What it goes through is named or written there.
        let rounds =
            (self.bytes + text.len()).saturating_pow(u32::try_from(loops).unwrap_or(u32::MAX));
        match loops {
            0 => named,
            _ => named.max(text.len()).saturating_mul(rounds),
        }
    }
}

/// Replaces every name that only a running task knows by the text of its own interpolation.
fn keep(expression: Expression, context: &Context) -> Result<Expression, hcl::eval::Error> {
    let boxed = |inner: Expression| keep(inner, context);
    Ok(match expression {
        Expression::Variable(name) if is_run_time(&name) => as_text(name.to_string()),
        Expression::Traversal(path) if is_run_time_path(&path) => as_text(path_text(&path)),
        Expression::TemplateExpr(template) => {
            let mut template = Template::from_expr(&template)?;
            for element in template.elements_mut() {
                if let Element::Interpolation(interpolation) = element {
                    let inner = std::mem::replace(&mut interpolation.expr, Expression::Null);
                    interpolation.expr = keep(inner, context)?;
                }
            }
            match template.elements() {
                // A string that is nothing but one interpolation has the type of what it names.
                [Element::Interpolation(only)] => only.expr.clone(),
                _ => Expression::String(template.evaluate(context)?),
            }
        }
        Expression::Array(items) => {
            Expression::Array(items.into_iter().map(boxed).collect::<Result<_, _>>()?)
        }
        Expression::Object(object) => {
            let entries = object.into_iter().map(|(key, value)| {
                let key = match key {
                    ObjectKey::Expression(key) => ObjectKey::Expression(keep(key, context)?),
                    key => key,
                };
                Ok((key, keep(value, context)?))
            });
            Expression::Object(entries.collect::<Result<_, hcl::eval::Error>>()?)
        }
        Expression::Parenthesis(inner) => keep(*inner, context)?,
        Expression::Conditional(conditional) => {
            let Conditional {
                cond_expr,
                true_expr,
                false_expr,
            } = *conditional;
            Conditional::new(
                keep(cond_expr, context)?,
                keep(true_expr, context)?,
                keep(false_expr, context)?,
            )
            .into()
        }
        Expression::FuncCall(call) => {
            let mut call: FuncCall = *call;
            let args = std::mem::take(&mut call.args);
            call.args = args.into_iter().map(boxed).collect::<Result<_, _>>()?;
            call.into()
        }
        Expression::Operation(operation) => {
            let mut operation = *operation;
            match &mut operation {
                Operation::Unary(unary) => {
                    unary.expr = keep(unary.expr.clone(), context)?;
                }
                Operation::Binary(binary) => {
                    binary.lhs_expr = keep(binary.lhs_expr.clone(), context)?;
                    binary.rhs_expr = keep(binary.rhs_expr.clone(), context)?;
                }
            }
            operation.into()
        }
        settled => settled,
    })
}

fn is_run_time(name: &Identifier) -> bool {
    !matches!(name.as_str(), "var" | "local")
}

fn is_run_time_path(path: &Traversal) -> bool {
    matches!(&path.expr, Expression::Variable(root) if is_run_time(root))
}

fn path_text(path: &Traversal) -> String {
    Expression::from(path.clone()).to_string()
}

fn as_text(name: String) -> Expression {
    Expression::String(format!("${{{name}}}"))
}

/// What a task's strings may name while it runs: its NOMAD_ variables, its environment, and what is known of the node, as
/// `attr.kernel.name`.
#[derive(Debug, Clone)]
pub struct RunTime {
    variables: BTreeMap<String, String>,
}

impl RunTime {
    pub fn new(variables: BTreeMap<String, String>) -> Self {
        RunTime { variables }
    }

    /// A value of the driver's configuration: every string is a template, and an unknown name is an error.
    pub fn config(&self, value: &Value, line: usize) -> Result<Value, JobError> {
        Ok(match value {
            Value::String(text) => Value::String(self.string(text, line)?),
            Value::Array(items) => {
                let items = items.iter().map(|item| self.config(item, line));
                Value::Array(items.collect::<Result<_, _>>()?)
            }
            Value::Object(object) => {
                let entries = object
                    .iter()
                    .map(|(key, value)| Ok((key.clone(), self.config(value, line)?)));
                Value::Object(entries.collect::<Result<_, _>>()?)
            }
            plain => plain.clone(),
        })
    }

    /// A string of the driver's configuration.
    pub fn string(&self, text: &str, line: usize) -> Result<String, JobError> {
        if !text.contains("${") && !text.contains("%{") {
            return Ok(text.to_owned());
        }
        let failed = |cause: String| JobError::new(line, format!("`{text}`: {cause}"));
        let mut template = Template::from_str(text).map_err(|error| failed(error.to_string()))?;
        for element in template.elements_mut() {
            if let Element::Interpolation(interpolation) = element
                && let Expression::Traversal(path) = &interpolation.expr
                && let Some(value) = self.variables.get(&path_text(path))
            {
                interpolation.expr = Expression::String(value.clone());
            }
        }
        template.evaluate(&self.context()).map_err(|error| {
            let unknown = |name: String| {
                failed(format!(
                    "this host does not know `{name}`; write a value in its place, or $${{{name}}} for the shell's own"
                ))
            };
            match (error.kind(), error.expr()) {
                (ErrorKind::UndefinedVar(_), Some(named)) => unknown(named.to_string()),
                (ErrorKind::UndefinedVar(name), None) => unknown(name.to_string()),
                _ => failed(error.to_string()),
            }
        })
    }

    /// A value of the `env` block. Nomad replaces only the names it knows here, and leaves the rest as it stands.
    pub fn env(&self, text: &str) -> String {
        let mut filled = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(start) = rest.find("${") {
            let (before, from) = rest.split_at(start);
            filled.push_str(before);
            let known = from.find('}').and_then(|end| {
                let value = self.variables.get(&from[2..end])?;
                Some((value, end + 1))
            });
            let (text, used) = known.map_or(("${", 2), |(value, used)| (value.as_str(), used));
            filled.push_str(text);
            rest = &from[used..];
        }
        filled.push_str(rest);
        filled
    }

    fn context(&self) -> Context<'_> {
        let mut context = Context::new();
        let env = self
            .variables
            .iter()
            .map(|(name, value)| (name.clone(), Value::from(value.as_str())));
        context.declare_var("env", Value::Object(env.collect()));
        for (name, value) in &self.variables {
            if let Ok(name) = Identifier::new(name.as_str()) {
                context.declare_var(name, value.as_str());
            }
        }
        context
    }
}

/// The first name of Nomad's that a filled-in text still holds.
pub fn open_name(text: &str) -> Option<&str> {
    let starts = text.match_indices("${").map(|(at, _)| &text[at + 2..]);
    let named = starts.filter_map(|rest| rest.split_once('}').map(|(name, _)| name));
    let ours = ["NOMAD_", "attr.", "meta.", "node."];
    let mut open = named.filter(|name| ours.iter().any(|prefix| name.starts_with(prefix)));
    open.next()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn names() -> Names {
        let mut names = Names::default();
        names.set_variable("port".into(), Value::from(8080));
        names.set_local("tag".into(), Value::from("blue"));
        names
    }

    fn read(text: &str) -> Value {
        let expression: Expression = text.parse().unwrap();
        names().evaluate(expression).unwrap()
    }

    fn run_time() -> RunTime {
        RunTime::new(BTreeMap::from([
            ("NOMAD_TASK_DIR".into(), "/m/local".into()),
            ("GREETING".into(), "hi".into()),
        ]))
    }

    #[test]
    fn variables_and_locals_are_settled_when_the_file_is_read() {
        assert_eq!(read("var.port"), Value::from(8080));
        assert_eq!(read("\"${var.port}\""), Value::from(8080));
        assert_eq!(
            read("\"${local.tag}-${var.port}\""),
            Value::from("blue-8080")
        );
        assert_eq!(
            read("var.port > 80 ? \"high\" : \"low\""),
            Value::from("high")
        );
    }

    #[test]
    fn names_of_a_running_task_stay_as_they_stand() {
        assert_eq!(
            read("\"${NOMAD_TASK_DIR}/x\""),
            Value::from("${NOMAD_TASK_DIR}/x")
        );
        assert_eq!(
            read("[\"a ${NOMAD_TASK_DIR} ${local.tag} \\\"q\\\" \\\\n\"]"),
            Value::from(vec!["a ${NOMAD_TASK_DIR} blue \"q\" \\n"])
        );
        assert_eq!(
            read("\"${attr.kernel.name}\""),
            Value::from("${attr.kernel.name}")
        );
        assert_eq!(
            read("\"${env[\"HOME\"]}\""),
            Value::from("${env[\"HOME\"]}")
        );
    }

    #[test]
    fn an_escaped_interpolation_survives_reading_only() {
        assert_eq!(read("\"$${HOME} $HOME\""), Value::from("${HOME} $HOME"));
        assert_eq!(
            read("\"$$${HOME}\"").as_str().unwrap().matches('$').count(),
            2
        );
    }

    #[test]
    fn an_unknown_local_is_an_error() {
        let expression: Expression = "local.missing".parse().unwrap();
        let error = names().evaluate(expression).unwrap_err().to_string();
        assert!(error.contains("missing"), "{error}");
    }

    #[test]
    fn a_running_task_fills_in_its_variables() {
        let filled = run_time().string("${NOMAD_TASK_DIR}/a ${env[\"GREETING\"]}", 3);
        assert_eq!(filled.unwrap(), "/m/local/a hi");
    }

    #[test]
    fn what_only_a_cluster_knows_is_named_with_its_line() {
        let error = run_time()
            .string("on ${attr.kernel.name}", 7)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("line 7:") && error.contains("attr"),
            "{error}"
        );
    }

    #[test]
    fn the_env_block_keeps_names_it_does_not_know() {
        assert_eq!(
            run_time().env("${NOMAD_TASK_DIR}:${OTHER}:${"),
            "/m/local:${OTHER}:${"
        );
    }

    #[test]
    fn a_few_lines_cannot_make_all_of_memory() {
        let mut names = Names::default();
        names.set_local("a".into(), Value::from("x".repeat(100_000)));
        let of = |text: &str| text.parse::<Expression>().unwrap();
        assert!(names.evaluate(of("\"${local.a}${local.a}\"")).is_ok());
        let many = format!("\"{}\"", "${local.a}".repeat(1_000));
        let nested = "[for a in [1, 2] : [for b in [1, 2] : local.a]]";
        for text in [many.as_str(), nested] {
            let error = names.evaluate(of(text)).unwrap_err().to_string();
            assert!(error.contains("shorten them"), "{error}");
        }
        // In all, too.
        let one = format!("\"{}\"", "${local.a}".repeat(100));
        assert!((0..10).any(|_| names.evaluate(of(&one)).is_err()));
    }

    #[test]
    fn a_script_with_a_loop_is_no_loop_of_the_files() {
        let names = Names::default();
        let script = format!("\"for i in 1 2; do echo {}; done\"", "x".repeat(20_000));
        assert!(names.evaluate(script.parse().unwrap()).is_ok());
    }
}
