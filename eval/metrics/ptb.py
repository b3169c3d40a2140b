"""Penn Treebank tokens of captions, as the field's caption scores have them, without Java.

COCO's caption scores are taken over the tokens of Stanford's PTBTokenizer 3.4.1 (options `-preserveLines
-lowerCase`) from which punctuation is then dropped. This module states the same token language as a table
of rules for `vlm.eval.metrics.lexer`: the automaton of these rules was compared with the Java scanner's own
state by state, and its output with Java's on 35,000 captions and on generated text.

Two differences are meant. A caption is tokenised on its own, so no rule looks into the next one; and letters
and digits are those of the running Python's Unicode, while the Java scanner knows those of Unicode 6.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

from vlm.eval.metrics.lexer import Scanner, expand

PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)

# Marks and letters that count as letters although Unicode's letter categories (as of 2012) lack them.
_MARKS = (
    "[\u00ad\u0237-\u024f\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02ff\u0300-\u036f\u0370-\u037d\u0384\u0385\u03cf"
    "\u03f6\u03fc-\u03ff\u0483-\u0487\u04cf\u04f6-\u04ff\u0510-\u0525\u055a-\u055f\u0591-\u05bd\u05bf\u05c1"
    "\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u063b-\u063f\u064b-\u065e\u0670\u06d6-\u06ef\u06fa-\u06ff\u070f"
    "\u0711\u0730-\u074f\u0750-\u077f\u07a6-\u07b1\u07ca-\u07f5\u07fa\u0900-\u0903\u093c\u093e-\u094e"
    "\u0951-\u0955\u0962-\u0963\u0981-\u0983\u09bc-\u09c4\u09c7\u09c8\u09cb-\u09cd\u09d7\u09e2\u09e3"
    "\u0a01-\u0a03\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd"
    "\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e30-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ebc\u0ec8-\u0ecd]"
)
# Symbols that stand alone.
_SYMBOLS = (
    "[+%&~\\^|\\\\\u00a6\u00a7\u00a8\u00a9\u00ac\u00ae\u00af\u00b0-\u00ba\u00d7\u00f7\u0387\u05be\u05c0\u05c3"
    "\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060a\u060c\u0614\u061b\u061e\u066a\u066d\u0703-\u070d"
    "\u07f6-\u07f8\u0964\u0965\u0e4f\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044"
    "\u207a-\u207f\u208a-\u208e\u2100-\u214f\u2190-\u2bff\u3012\u30fb\uff01-\uff0f\uff1a-\uff20"
    "\uff3b-\uff40\uff5b-\uff65]"
)
_BREAK = " \t\n\f\r"

_DEFINITIONS = {
    "SPACE": "[ \t\u00a0\u2000-\u200a\u3000]",
    "NEWLINE": "[\r\n\u2028\u2029\x0b\x0c\x85]|\r\n",
    "SPACENL": "{SPACE}|{NEWLINE}",
    "DIGIT": "\\d|[\u07c0-\u07c9]",
    "LETTER": f"\\l|&[aeiouAEIOU](acute|grave|uml);|{_MARKS}",
    "ALNUM": "\\l|\\d",
    "WORD": "{LETTER}({LETTER}|{DIGIT})*([.!?]{LETTER}({LETTER}|{DIGIT})*)*",
    "APOS": "['\u0092\u2019]|&apos;",
    "APOS_LIKE": "{APOS}|[`\u0091\u2018\u201b]",
    # 's, 'm, 'd, 're, 've, 'll; and the n't of a word whose own last letter is not n.
    "CLITIC": "{APOS}([msdMSD]|re|ve|ll)",
    "NEGATED": "[A-Za-z\u00ad]*[A-MO-Za-mo-z](\u00ad)*",
    "NEGATION": "n{APOS_LIKE}t",
    # Apostrophes that stay inside one token: 'em, ol', O'Brien, d'accord, rock'n'roll's 'n', '90s.
    "APOSTROPHED": (
        "{APOS}n{APOS}?|[lLdDjJ]{APOS}|Dunkin{APOS}|somethin{APOS}|ol{APOS}|{APOS}em"
        "|[A-HJ-XZn]{APOS_LIKE}\\l\\l\\l*|{APOS}[2-9]0s|{APOS}till?"
        "|\\l\\l*[aeiouyAEIOUY]{APOS_LIKE}[aeiouA-Z]\\l*|{APOS}cause|cont'd\\.?|nor'easter|c'mon|e'er"
        "|s'mores|ev'ry|li'l|nat'l|O{APOS_LIKE}o"
    ),
    "NUM": "{DIGIT}+|{DIGIT}*([.:,\u00ad\u066b\u066c]{DIGIT}+)+",
    "FRACTION": "({DIGIT}{1,4}[- \u00a0])?{DIGIT}{1,4}(\\\\?/|\u2044){DIGIT}{1,4}",
    "PHONE": (
        "(\\([0-9]{2,3}\\)[ \u00a0]?|(\\+\\+?)?([0-9]{2,4}[\\- \u00a0])?[0-9]{2,4}[\\- \u00a0])"
        "[0-9]{3,4}[\\- \u00a0]?[0-9]{3,5}|((\\+\\+?)?[0-9]{2,4}\\.)?[0-9]{2,4}\\.[0-9]{3,4}\\.[0-9]{3,5}"
    ),
    "PATH": f'/[^{_BREAK}"<>|()]+[^{_BREAK}"<>|.!?(){{}},\\-]',
    "FULL_URL": f'https?://[^{_BREAK}"<>|(){{}}]+[^{_BREAK}"<>|.!?(){{}},\\-]',
    # The first class below runs from ',' to '_': an old slip in the rule that scores depend on.
    "URL": f'(www\\.([^{_BREAK}"<>|.!?(){{}},]+\\.)+[a-zA-Z]{{2,4}}'
    f"|([^{_BREAK}\"`'<>|.!?(){{}},-_$]+\\.)+(com|net|org|edu))({{PATH}})?",
    "EMAIL": f'(&lt;|<)?[a-zA-Z0-9][^{_BREAK}"<>|(){{}}\u00a0]*@([^{_BREAK}"<>|(){{}}.\u00a0]+\\.)*'
    f'[^{_BREAK}"<>|(){{}}.\u00a0]+(&gt;|>)?',
    "EXTENSION": (
        "bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt"
        "|ps|py|sql|tar|txt|wav|x|xml|zip"
    ),
    "TAG_NAME": "[A-Za-z][A-Za-z0-9_:.\\-]*",
    "TAG_VALUE": "[ ]*=[ ]*('[^'\r\n]*'|\"[^\"\r\n]*\")",
    "TAG": "<([!?][A-Za-z\\-][^>\r\n]*|{TAG_NAME}([ ]+{TAG_NAME}({TAG_VALUE})?)*[ ]*/?|/{TAG_NAME})[ ]*>",
    # Hyphenated words, then words joined by & or +, then words joined by a slash.
    "HYPHEN": "[\\-_\u058a\u2010\u2011]",
    "PARTICLE": "[dDoOlL]{APOS_LIKE}{ALNUM}",
    "JOINED": "{PARTICLE}?{ALNUM}+({HYPHEN}{PARTICLE}?{ALNUM}+)*",
    "HYPHENED": "[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(-([A-Za-z0-9\u00ad]+|{ACRONYM2}\\.))+",
    "ANDED": "[A-Z]+(([+&]|&amp;)[A-Z]+)+",
    "SLASHED": "[A-Za-z0-9]+(-[A-Za-z]+){0,2}(\\\\?/[A-Za-z0-9]+(-[A-Za-z]+){0,2}){1,2}",
    "US_PAIR": "(Canada|Sino|Korean|EU|Japan|non)-U\\.S|U\\.S\\.-(U\\.K|U\\.S\\.S\\.R)",
    "ACRONYM": "[A-Za-z](\\.[A-Za-z])*|{US_PAIR}",
    "ACRONYM2": "[A-Za-z](\\.[A-Za-z])+|{US_PAIR}",
    # Abbreviations after which a capital starts a new sentence, before a name, and before a number.
    # A capital in a class ([M]ass) must be one: the word without it is common.
    "ENDING": (
        "(Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|Mon|Tue|Tues|Wed|Thu|Thurs|Fri"
        "|Ala|Ariz|[A]z|[A]rk|Calif|Colo|Conn|Ct|Dak|[D]el|Fla|Ga|[I]ll|Ind|Kans?|Ky|[L]a|[M]ass|Md|Mich"
        "|Minn|[M]iss|Mo|Mont|Neb|Nev|Okla|[O]re|[P]a|Penn|Tenn|[T]ex|Va|Vt|[W]ash|Wisc?|Wyo"
        "|Inc|Cos?|Corp|Pp?t[ye]s?|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys|tel|est|ext|sq"
        "|Jr|Sr|Bros|(Ed|Ph)\\.D|Blvd|Rd|Esq|etc|al|seq|Bldg)\\."
    ),
    "BEFORE_NAME": (
        "Mr|Mrs|Ms|[M]iss|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt"
        "|Capt|Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp"
        "|Mlle|Mme|Msgr|Sfc|vs|Alex|Wm|Jos|Cie|a\\.k\\.a|cf|TREAS|Ph|{ACRONYM}|Invt|Elec|Natl|M[ft]g|Dept"
    ),
    "BEFORE_NUMBER": "(ca|figs?|prop|nos?|art|bldg|pp|op)\\.",
    "SENTENCE_START": (
        "[A]bout|[A]ccording|[A]dditionally|[A]fter|[A]n?|[A]s|[A]t|[B]ut|[E]arlier|[H]e|[H]er|[H]ere"
        "|[H]owever|[I]f|[I]n|[I]t|[L]ast|[M]any|[M]ore|[M]r\\.|[M]s\\.|[N]ow|[O]nce|[O]ne|[O]ther|[O]ur"
        "|[S]he|[S]ince|[S]o|[S]ome|[S]uch|[T]hat|[T]he|[T]heir|[T]hen|[T]here|[T]hese|[T]hey|[T]his"
        "|[W]e|[W]hen|[W]hile|[W]hat|[Y]et|[Y]ou|{TAG}"
    ),
    "QUOTED": (
        "-(RRB|LRB|RCB|LCB|RSB|LSB)-|C\\.D\\.s|pro-|anti-|S(&|&amp;)P-500|S(&|&amp;)Ls|Cap{APOS}n|c{APOS}est"
    ),
    "FACE": (
        "[\\^x=~<>]\\.\\[\\^x=[^<]*<>\\]|[\\-\\^x=~<>']_[\\-\\^x=~<>']|\\([\\-\\^x=~<>'][_.]?[\\-\\^x=~<>']\\)"
        "|\\([\\^x=~<>']-[\\^x=~<>'`]\\)"
    ),
    "PAUSE": "[,;:\u3001]",
}


def _plain(text: str) -> str:
    return text


def _soft(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _spaced(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _ampersand(text: str) -> str:
    return re.sub("&amp;", "&", text, flags=re.IGNORECASE)


def _brackets(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-")


def _close_quote(text: str) -> str:
    return _curly(re.sub('"|&quot;', "''", text.replace("&apos;", "'")))


def _open_quote(text: str) -> str:
    return _curly(re.sub('"|&quot;', "``", re.sub("&apos;|'", "`", text)))


def _curly(text: str) -> str:
    text = re.sub("[\x91\u2018\u201b\u2039]", "`", text)
    text = re.sub("[\x92\u2019\u203a]", "'", text)
    return re.sub("[\x94\u201d\u00bb]", "''", re.sub("[\x93\u201c\u00ab]", "``", text))


def _currency(text: str) -> str:
    return re.sub("[\x80\u00a4\u20a0\u20ac]", "$", text.replace("\u00a2", "cents").replace("\u00a3", "#"))


def _fraction(text: str) -> str:
    return {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}.get(
        text, text
    )


def _dashes(text: str) -> str:
    return "--" if len(text) in (3, 4) else text


class Rule(NamedTuple):
    """What matches (`before` a context that is not consumed), the token made of it, characters given back.

    `token` is None for what is skipped; a number of characters `split` off the end becomes the next token;
    with `stop` the final full stop is in the token and is scanned again as the sentence's end.
    """

    pattern: str
    token: Callable[[str], str] | None = _plain
    before: str = ""
    split: int = 0
    stop: bool = False


def _always(token: str) -> Callable[[str], str]:
    return lambda text: token


# The longest match wins; among equally long ones (the context counts) the earlier rule.
RULES = (
    Rule("cannot|'twas", split=3),
    Rule("'tis|gonna|gotta|lemme|gimme|wanna", split=2),
    Rule("{TAG}", _spaced),
    Rule("&(MD|mdash|ndash);|[\u0096\u0097\u2013\u2014\u2015]", _always("--")),
    Rule("&amp;", _ampersand),
    Rule("&(HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);"),
    Rule("{WORD}", _soft, before="{CLITIC}"),
    Rule("{NEGATED}", _soft, before="{NEGATION}"),
    Rule("{WORD}", _soft),
    Rule("{APOSTROPHED}"),
    Rule("y{APOS}", before="\\l"),
    Rule("{FULL_URL}"),
    Rule("{URL}"),
    Rule("{EMAIL}"),
    Rule("@[a-zA-Z_][a-zA-Z_0-9]*|#{LETTER}+"),
    Rule("{CLITIC}", _close_quote, before="[^A-Za-z]"),
    Rule("{NEGATION}", _close_quote, before="[^A-Za-z]"),
    Rule("{NEGATION}", _close_quote),
    Rule("c[+][+]|(c|f)#"),
    Rule("{DIGIT}{1,2}[\\-/]{DIGIT}{1,2}[\\-/]{DIGIT}{2,4}"),
    Rule("[\\-+]?{NUM}", _soft),
    Rule("[\u207a\u207b\u208a\u208b]?([\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    Rule("{FRACTION}", _spaced),
    Rule("[\u00bc-\u00be\u2153-\u215e]", _fraction),
    Rule("{QUOTED}", _ampersand),
    Rule("{SLASHED}"),
    Rule("[A-Z]*\\$|#"),
    Rule("[\u00a2-\u00a5\u0080\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]", _currency),
    Rule("{ACRONYM}\\.", before="{SPACENL}+({SENTENCE_START}){SPACENL}", stop=True),
    Rule("{BEFORE_NUMBER}", before="{SPACENL}?\\d"),
    Rule("(pt[eyEY]|co)\\.", before="{SPACE}(ltd|lim)"),
    Rule("{ENDING}", before="{SPACENL}({SPACENL}|\\u|{TAG})", stop=True),
    Rule("{ENDING}", before="\\a\\a"),
    Rule("{ENDING}", stop=True),
    Rule("({BEFORE_NAME})\\."),
    Rule("{BEFORE_NAME}", before="{SPACE}"),
    Rule("{ACRONYM}", before="{SPACENL}"),
    Rule("{APOS}[0-9][0-9]", before="{SPACENL}"),
    Rule("({LETTER}|{DIGIT})+(\\.({LETTER}|{DIGIT})+)*\\.{EXTENSION}", before="{SPACENL}|[.?!,]"),
    Rule("{WORD}\\.", _soft, before="{PAUSE}"),
    Rule("{PHONE}", lambda text: _brackets(_spaced(text))),
    Rule('"|&quot;', _open_quote, before="[A-Za-z0-9$]"),
    Rule('"|&quot;', _close_quote),
    Rule("\x7f", None),
    Rule("<|&lt;", _always("<")),
    Rule(">|&gt;", _always(">")),
    Rule("[<>]?[:;=][\\-o*']?[()DPdpO\\\\{@|\\[\\]]", _brackets, before="[^A-Za-z0-9]"),
    Rule("{FACE}", _brackets),
    Rule("\\{", _always("-LCB-")),
    Rule("\\}", _always("-RCB-")),
    Rule("\\[", _always("-LSB-")),
    Rule("\\]", _always("-RSB-")),
    Rule("\\(", _always("-LRB-")),
    Rule("\\)", _always("-RRB-")),
    Rule("\\-+", _dashes),
    Rule("\\.{3,5}|(\\.[ \u00a0]){2,4}\\.|[\u0085\u2026]", _always("...")),
    Rule("@+|#+|_+"),
    Rule("\\*+|(\\\\\\*){1,3}"),
    Rule("{PAUSE}"),
    Rule("[?!]+"),
    Rule("[.\u00a1\u00bf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002=/]"),
    Rule("{HYPHENED}\\.", _soft, before="{PAUSE}"),
    Rule("{HYPHENED}", _soft),
    Rule("{JOINED}\\.", before="{PAUSE}"),
    Rule("{JOINED}"),
    Rule("{ANDED}\\.", _ampersand, before="{PAUSE}"),
    Rule("{ANDED}", _ampersand),
    Rule("'", _open_quote, before="[A-Za-z][^ \t\n\r\u00a0]"),
    Rule("{CLITIC}", _close_quote),
    Rule("{APOS}|''|[`\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{1,2}", _close_quote),
    Rule("<<|>>"),
    Rule(_SYMBOLS),
    Rule("\0|{SPACE}+|[\u200b\u200e\u200f\ufeff]|&nbsp;|{NEWLINE}|\\a", None),
)


@cache
def _scanners() -> tuple[Scanner, tuple[tuple[Scanner, Scanner] | None, ...]]:
    """The scanner of all rules, and for each rule with a context the scanners of its two halves."""
    halves = [(expand(rule.pattern, _DEFINITIONS), expand(rule.before, _DEFINITIONS)) for rule in RULES]
    whole = Scanner(f"({pattern})({before})" if before else pattern for pattern, before in halves)
    return whole, tuple(
        (Scanner([pattern]), Scanner([before])) if before else None for pattern, before in halves
    )


def words(caption: str) -> list[str]:
    """Every token of one caption, punctuation among them, before lower-casing."""
    whole, halves = _scanners()
    # The scanner works on UTF-16 units, as Java does; a caption ends with a line's end.
    units = re.sub("[\U00010000-\U0010ffff]", _surrogates, caption.replace("\n", " ")) + "\n"
    tokens, at = [], 0
    while at < len(units):
        number, end = whole.match(units, at)
        rule, split = RULES[number], halves[number]
        if split is not None:
            stops = split[0].ends(units, at, end)
            end = next(stop for stop in reversed(stops) if end in split[1].ends(units, stop, end))
        text = units[at:end]
        if rule.token is not None:
            single = rule.stop and len(text) == 2
            kept = len(text) - rule.split - single
            tokens.append(rule.token(text[:kept]))
            end = end - 1 if rule.stop else at + kept
        at = end
    return tokens


def _surrogates(match: re.Match[str]) -> str:
    raw = match[0].encode("utf-16-le")
    return "".join(chr(raw[i] | raw[i + 1] << 8) for i in range(0, len(raw), 2))


def tokenize(caption: str) -> str:
    """The caption's tokens, lower case, without punctuation, joined by single spaces: what scorers read.

    Brackets stay, as `-lrb-`: the punctuation list holds `-LRB-` and is applied after lower-casing.
    """
    line = " ".join(words(caption)).lower().rstrip()
    text = " ".join(token for token in line.split(" ") if token not in PUNCTUATION)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def tokenize_all(captions: Iterable[str]) -> list[str]:
    """`tokenize` for many captions."""
    return [tokenize(caption) for caption in captions]
