"""What the demo says, and what its language model learns from. People wrote it."""

TOUR = """\
This is pyserve's demo: no model is running, these words were written by people.

Everything you read here comes out of a log. The generation writes to it; your connection only \
reads it. Reload this page now, in the middle of the sentence: the text goes on where it was, \
because what was written before is still there and the generation never noticed that you left.

Open a second tab on the same conversation, and both follow. Pull the network cable, wait, plug \
it in again: your browser sends the id of the last event it saw, and the stream continues with \
the next one, not a character lost or doubled.

Press Stop, and the generation ends for everyone who is watching, wherever it was: the upstream's \
connection is closed at once, so that its slot is free for somebody else.

To see it with a model, start pyserve with --model FILE.gguf, or put it in front of the server \
that you have with --upstream URL. Nothing else changes.
"""

#: Short paragraphs that say similar things in similar words: so a model of three words at a time
#: has somewhere to turn in nearly every sentence.
NOTES = """\
A stream is a log that somebody writes and others read. The log is kept in memory, and the reader \
comes and goes. What the reader has seen is a number, and the number is enough to go on.

A reader never owns the stream. The reader may be a page, a phone or a program, and when it leaves \
the generation goes on, because the log is still there and somebody may come back.

A model writes one word after another. The words go into the log, the log goes to every reader, \
and every reader sees the same words in the same order, not one of them lost.

A model that writes for one reader can write for many readers at the same time. It takes a step, \
and in each step every sequence gets a word. Who comes late joins between two steps, and who has \
had enough leaves between two steps.

A batch is a number of sequences that take a step at the same time. A step for sixteen of them \
takes hardly longer than a step for one of them, and so the batch is worth a short wait.

A queue is fair when nobody waits for ever. Who comes first goes first, but who has a hundred \
requests does not go before somebody who has only one.

A slot is a place in the model where one sequence can grow. When the sequence ends the slot is \
free, and the next one in the queue takes it. When somebody presses Stop the slot is free at once.

An event is a piece of the stream with a number of its own. The browser keeps the number of the \
last event, and when the connection is lost it asks for the next one.

An offset is a count of bytes from the start of the log. It says where a reader is, and it says \
where the reader goes on. A page that knows its offset has nothing to fear from a reload.

An answer has three endings. It is completed when the model has said what it had to say, it is \
cancelled when somebody presses Stop, and it is failed when the connection to the model is lost.

The generation and the connection are two things. When they are one thing, a lost connection is a \
lost answer, and the words that were written for nobody are written again. When they are two \
things, nothing is lost and nothing is written again.

The log has an end that grows and a start that may be dropped. The oldest bytes go first when the \
log is full, and a reader that comes too late is told so, because a gap in the text is worse than \
an error.

The network is not a wire. A phone goes from one network to another, a train goes into a tunnel, \
a cable is pulled, and every time the connection is lost while the model goes on writing.

The page in front of you only reads. It asks for the log from the place where it was, and the \
server sends what was written before and then what is written now. So two tabs show the same text.

The server does little, and that is why it can do it for many. It takes the bytes as they come, \
it keeps them in the log, and it sends them to every reader that is there.

The browser can follow a stream by itself. It sends the id of the last event it saw, the server \
sends the next one, and the page does not notice that the connection was lost.

The heart of the server beats once in a second. While nothing is written the server says that it \
is still there, so that nobody takes a long thought of the model for a lost connection.

When a reader is slow, the others do not wait. Each of them reads the log at its own pace, and the \
model writes at its own pace, and the log stands between them.

When a model is tired of one subject it turns to another. This one knows only three words at a \
time, so it is tired very often, and it turns in the middle of the sentence.

When the server ends, it says so to every reader. The stream gets its last event, the log gets its \
last line, and the connection is closed in good order.

Nobody reads the words of somebody else. A conversation has an owner, and who is not the owner is \
told that there is nothing, in the same words as when there is nothing.

Everything that is written is written once. It goes into the log as whole events, and from there \
it goes to the readers as it is, not a character more and not a character less.

You can leave now and come back later. The text goes on without you, and when you come back it is \
all there, because the log is kept for some minutes after the end.

You are reading the words of a very small model. It has read a few paragraphs that were written by \
people, it counts which word comes after which, and it throws dice for the next one.
"""
