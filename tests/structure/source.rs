//! The sources, read with `syn`: without comments and unit tests.

use std::cell::OnceCell;
use std::fs;
use std::path::Path;
use std::rc::Rc;

use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens;
use syn::Item;

/// A file of the proxy's package or of `crates/`.
pub(crate) struct Source {
    /// From the workspace's root: `src/session/routed.rs`.
    pub(crate) path: String,
    pub(crate) text: String,
    pub(crate) file: syn::File,
    code: OnceCell<String>,
    paths: OnceCell<Vec<Vec<String>>>,
}

/// All of them. Shared, as each is read once and every rule is tried many times.
pub(crate) type Sources = Vec<Rc<Source>>;

pub(crate) fn sources() -> Sources {
    let files = files(&["src", "crates"]).into_iter();
    files.map(|(path, text)| Rc::new(Source::new(&path, &text))).collect()
}

/// Every Rust file below these folders, and its text.
pub(crate) fn files(folders: &[&str]) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders: Vec<_> = folders.iter().map(|folder| root.join(folder)).collect();
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).expect("inside").display().to_string();
                found.push((name, fs::read_to_string(&path).expect("a source")));
            }
        }
    }
    found.sort();
    assert!(found.len() > 100, "{} files", found.len());
    found
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Source {
        let mut file = syn::parse_file(text).expect(path);
        file.items.retain(|item| !matches!(item, Item::Mod(item) if is_for_tests(item)));
        let (code, paths) = Default::default();
        Source { path: path.to_owned(), text: text.to_owned(), file, code, paths }
    }

    /// The module of the proxy's library that the file is; `None` of other packages, of the program
    /// and of unit tests.
    pub(crate) fn module(&self) -> Option<Vec<&str>> {
        let inside = self.path.strip_prefix("src/")?.strip_suffix(".rs")?;
        let parts: Vec<_> = inside.split('/').collect();
        let is_of_library = !matches!(parts[..], ["main" | "lib"]) && !parts.contains(&"tests");
        is_of_library.then_some(parts)
    }

    /// The code as [`text`].
    pub(crate) fn code(&self) -> &str {
        self.code.get_or_init(|| text(&self.file))
    }

    /// Every path that begins with `crate`, `self` or `super`, as it is from `crate` on.
    pub(crate) fn paths(&self) -> &[Vec<String>] {
        self.paths.get_or_init(|| {
            let mut found = Vec::new();
            spread(self.file.to_token_stream(), &[], &mut found);
            let module = self.module().unwrap_or_default();
            found.into_iter().filter_map(|path| resolve(path, &module)).collect()
        })
    }
}

/// Code without any space.
pub(crate) fn text(code: &impl ToTokens) -> String {
    code.to_token_stream().to_string().split_whitespace().collect()
}

fn is_for_tests(module: &syn::ItemMod) -> bool {
    module.attrs.iter().any(|attribute| text(attribute) == "#[cfg(test)]")
}

/// All paths among these tokens. With a `prefix` they are a tree of a `use`, behind that.
fn spread(tokens: TokenStream, prefix: &[String], found: &mut Vec<Vec<String>>) {
    let begin = || (prefix.to_vec(), if prefix.is_empty() { 0 } else { 2 });
    let (mut path, mut colons) = begin();
    for token in tokens {
        match token {
            TokenTree::Punct(mark) if mark.as_char() == ':' => colons += 1,
            // `a::{self}` is a.
            TokenTree::Ident(word) if colons == 2 => {
                path.extend(Some(word.to_string()).filter(|word| word != "self"));
                colons = 0;
            }
            TokenTree::Group(group) if colons == 2 => spread(group.stream(), &path, found),
            TokenTree::Ident(word) => {
                found.push(std::mem::replace(&mut path, vec![word.to_string()]));
                colons = 0;
            }
            TokenTree::Group(group) => spread(group.stream(), &[], found),
            TokenTree::Punct(_) | TokenTree::Literal(_) => {
                found.push(path);
                (path, colons) = begin();
            }
        }
    }
    found.push(path);
}

fn resolve(path: Vec<String>, module: &[&str]) -> Option<Vec<String>> {
    let supers = path.iter().take_while(|word| *word == "super").count();
    match path.first()?.as_str() {
        _ if path.len() < 2 => None,
        "crate" => Some(path),
        "self" | "super" => {
            let above = ["crate"].iter().chain(&module[..module.len().saturating_sub(supers)]);
            let below = path.iter().skip(supers.max(1)).cloned();
            Some(above.map(|word| (*word).to_owned()).chain(below).collect())
        }
        _ => None,
    }
}

#[test]
fn paths_are_spread_out_and_resolved() {
    let text = "use crate::{b, c::{self, d as e}, f::*};
        use super::g;
        fn h(i: self::j::K, l: &'static m::N) -> crate::o {
            select! { a = crate::p::q(x::<super::r::S>()) => 1 }
        }";
    let source = Source::new("src/x/y.rs", text);
    let mut paths: Vec<_> = source.paths().iter().map(|path| path.join(" ")).collect();
    let expected =
        "crate b|crate c|crate c d|crate f|crate o|crate p q|crate x g|crate x r S|crate x y j K";
    paths.sort();
    paths.dedup();
    assert_eq!(paths.join("|"), expected);
}
